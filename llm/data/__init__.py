"""From raw text to batches, one file a stage.

sources, readers, packaged -> clean (language, quality, personal_data) -> dedup, duplicates -> split -> shards, pack ->
objectives, loader, mixture. `preparation` plans the work, `phases` and `finish` do it, `execute` says where.
"""

from llm.data.execute import Execution
from llm.data.loader import Dataset, batch_at, prefetch, sequential
from llm.data.mixture import Mixture
from llm.data.preparation import Prepared, open_prepared, prepare
from llm.data.spec import CleanSpec, DataSpec, DedupSpec, ObjectiveSpec
from llm.data.work import Preparation

__all__ = [
    "CleanSpec",
    "DataSpec",
    "Dataset",
    "DedupSpec",
    "Execution",
    "Mixture",
    "ObjectiveSpec",
    "Preparation",
    "Prepared",
    "batch_at",
    "open_prepared",
    "prefetch",
    "prepare",
    "sequential",
]
