"""The settings of evaluation."""

import dataclasses

from llm.errors import InputError


@dataclasses.dataclass(frozen=True)
class EvaluationSpec:
    """How the validation set is evaluated.

    Attributes:
        batch_size: rows at a time; it changes speed and memory, not the result.
    """

    batch_size: int = 32

    def __post_init__(self):
        if self.batch_size < 1:
            raise InputError(f"evaluation.batch_size={self.batch_size}: must be at least 1")
