"""The settings of sampling."""

import dataclasses
import math

from llm.errors import InputError


@dataclasses.dataclass(frozen=True)
class SamplingSpec:
    """How the next token is drawn from the logits.

    What is on acts in this order: repetition penalty, presence and frequency penalty, logit bias, minimum of tokens,
    no-repeat n-gram (`llm.generation.penalties`), then temperature, top-k, top-p, min-p (`llm.generation.sampling`).

    Attributes:
        temperature: divides the logits; 0 takes the most likely token.
        top_k: only the k most likely tokens, ties by lower id; 0 is off.
        top_p: only the most likely tokens while the mass before each is below p; 1 is off.
        min_p: only tokens at least this share as likely as the most likely one; 0 is off.
        repetition_penalty: positive logits of tokens in prompt or output are divided by it, negative ones multiplied,
            once a distinct token (Keskar et al. 2019); 1 is off.
        presence_penalty: taken from the logits of tokens in the output, once; 0 is off.
        frequency_penalty: the same for each time that the token stands there; 0 is off.
        no_repeat_ngram: no sequence of so many tokens stands twice in prompt and output; 0 is off.
        logit_bias: pairs (id, what is added to its logit); -inf is never drawn.
        min_tokens: so many are drawn before a token may end the row.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0

    def __post_init__(self):
        if not (self.temperature == 0 or 1e-30 <= self.temperature < math.inf):
            raise InputError(
                f"temperature={self.temperature}: must be 0, which is greedy, or a finite number of at least 1e-30"
            )
        for name in ("top_k", "no_repeat_ngram", "min_tokens"):
            if getattr(self, name) < 0:
                raise InputError(f"{name}={getattr(self, name)}: must not be negative (0 is off)")
        if not 0 <= self.top_p <= 1:
            raise InputError(f"top_p={self.top_p}: must lie in 0..1 (1 is off)")
        if not 0 <= self.min_p <= 1:
            raise InputError(f"min_p={self.min_p}: must lie in 0..1 (0 is off)")
        if not 0 < self.repetition_penalty < math.inf:
            raise InputError(f"repetition_penalty={self.repetition_penalty}: must be above 0 (1 is off)")
        for name in ("presence_penalty", "frequency_penalty"):
            if not math.isfinite(getattr(self, name)):
                raise InputError(f"{name}={getattr(self, name)}: must be a finite number (0 is off)")
        if len({token for token, _ in self.logit_bias}) < len(self.logit_bias):
            raise InputError("logit_bias names a token twice: give each id one value")
        for token, bias in self.logit_bias:
            if token < 0 or not bias < math.inf:
                raise InputError(f"logit_bias {token}:{bias}: expected an id and a number below infinity")

    @property
    def looks_back(self) -> bool:
        """Whether drawing depends on the tokens so far other than through the model."""
        penalties = self.repetition_penalty != 1, self.presence_penalty != 0, self.frequency_penalty != 0
        return any(penalties) or self.no_repeat_ngram > 0


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
        banned: ids that are never written.
    """

    prompts: tuple[str, ...] = ()
    max_tokens: int = 64
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    opening: str = "end_of_text"
    ends: tuple[int, ...] = ()
    banned: tuple[int, ...] = ()

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
        return self.allowing(SamplingSpec(self.temperature, self.top_k, self.top_p))

    def allowing(self, sampling: SamplingSpec) -> SamplingSpec:
        """Other ways to draw, by which what is banned is not drawn either."""
        banned = tuple((i, -math.inf) for i in self.banned)
        return dataclasses.replace(sampling, logit_bias=(*sampling.logit_bias, *banned))

    def all_ends(self, end_of_text: int) -> tuple[int, ...]:
        """The ids that end a text: the tokenizer's end of text, and `ends`."""
        return (end_of_text, *self.ends)
