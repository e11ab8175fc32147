"""Attention: arrays in, arrays out. One function, `attention`, and the `Mask` that says what may be seen."""

from llm.attention.api import IMPLEMENTATIONS, attention, attention_passes
from llm.attention.bias import BucketBias, relative_position_bucket
from llm.attention.mask import Mask
from llm.attention.merge import merge
from llm.attention.passes import Passes
from llm.attention.reference import attention_weights

__all__ = [
    "IMPLEMENTATIONS",
    "BucketBias",
    "Mask",
    "Passes",
    "attention",
    "attention_passes",
    "attention_weights",
    "merge",
    "relative_position_bucket",
]
