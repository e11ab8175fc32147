"""Checkpoints of others, in and out: safetensors, torch pickles and GGUF, by one table of names a family."""

from llm.weights.families import Imported, beside, identify, table_of, their_config
from llm.weights.layout import Loaded, load, tensors_of
from llm.weights.sources import Source, Tensor, open_source
from llm.weights.writing import write_checkpoint

__all__ = [
    "Imported",
    "Loaded",
    "Source",
    "Tensor",
    "beside",
    "identify",
    "load",
    "open_source",
    "table_of",
    "tensors_of",
    "their_config",
    "write_checkpoint",
]
