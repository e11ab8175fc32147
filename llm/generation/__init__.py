"""Generating text: sampling rules and the cached decoding loop."""

from llm.generation.engine import generate
from llm.generation.sampling import filter_logits, sample
from llm.generation.spec import GenerationSpec, SamplingSpec

__all__ = ["GenerationSpec", "SamplingSpec", "filter_logits", "generate", "sample"]
