"""The settings of evaluation."""

import dataclasses

from llm.errors import InputError


@dataclasses.dataclass(frozen=True)
class EvaluationSpec:
    """How the validation set is evaluated.

    Attributes:
        batch_size: rows at a time; it changes speed and memory, not the result.
        language: of the texts that an encoder-decoder writes, "de" or "zh": it decides how BLEU splits words.
        answer_tokens: the longest answer that "span_qa" may give.
    """

    batch_size: int = 32
    language: str = "en"
    answer_tokens: int = 30

    def __post_init__(self):
        for name in ("batch_size", "answer_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"evaluation.{name}={getattr(self, name)}: must be at least 1")
        if not self.language:
            raise InputError("evaluation.language is empty: name the language, 'en'")

    def with_batch_size(self, batch_size: int) -> "EvaluationSpec":
        """The same with another batch size."""
        return dataclasses.replace(self, batch_size=batch_size)
