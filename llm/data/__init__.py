"""From text to batches, one file a stage: sources, clean, split, pack, objectives, loader; `prepare` runs them."""

from llm.data.loader import Dataset, batch_at, prefetch, sequential
from llm.data.preparation import Prepared, open_prepared, prepare
from llm.data.spec import DataSpec

__all__ = ["DataSpec", "Dataset", "Prepared", "batch_at", "open_prepared", "prefetch", "prepare", "sequential"]
