"""The settings of sampling."""

import dataclasses
import math

from llm.errors import InputError


@dataclasses.dataclass(frozen=True)
class SamplingSpec:
    """How the next token is drawn from the logits.

    Filters act in this order: temperature, top-k, top-p.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token.
        top_k: only the k most likely tokens, ties by lower id; 0 is off.
        top_p: only the most likely tokens while the mass before each is below p; 1 is off.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"temperature={self.temperature}: must be a finite number, not negative (0 is greedy)")
        if self.top_k < 0:
            raise InputError(f"top_k={self.top_k}: must not be negative (0 is off)")
        if not 0 <= self.top_p <= 1:
            raise InputError(f"top_p={self.top_p}: must lie in 0..1 (1 is off)")


@dataclasses.dataclass(frozen=True)
class GenerationSpec:
    """The continuations that a run shows at its end.

    Attributes:
        prompts: one continuation each.
        max_tokens: new tokens at most, cut to what the model's context leaves.
        temperature, top_k, top_p: as in `SamplingSpec`.
        opening: what stands before a prompt that is to be continued: "end_of_text", as between the texts of training,
            "bos", or "" for nothing, as models of others may want it.
        ends: ids that end a text as well as the tokenizer's end of text does.
    """

    prompts: tuple[str, ...] = ()
    max_tokens: int = 64
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    opening: str = "end_of_text"
    ends: tuple[int, ...] = ()

    def __post_init__(self):
        if self.opening not in ("end_of_text", "bos", ""):
            raise InputError(f"generation.opening={self.opening!r}: there are 'end_of_text', 'bos', ''")
        if self.max_tokens < 1:
            raise InputError(f"generation.max_tokens={self.max_tokens}: must be at least 1")
        if any(not prompt for prompt in self.prompts):
            raise InputError("generation.prompts holds an empty prompt")
        try:
            self.sampling()
        except InputError as error:
            raise InputError(f"generation.{error}") from None

    def sampling(self) -> SamplingSpec:
        """The sampling part of these settings."""
        return SamplingSpec(self.temperature, self.top_k, self.top_p)
