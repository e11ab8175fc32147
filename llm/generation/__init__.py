"""Generating text: sampling rules, the cached decoding loop, and the ways to run it."""

from llm.generation.engine import Completion, complete, generate
from llm.generation.sampling import filter_logits, sample
from llm.generation.spec import GenerationSpec, SamplingSpec

__all__ = ["Completion", "GenerationSpec", "SamplingSpec", "complete", "filter_logits", "generate", "sample"]
