"""The settings of data preparation."""

import dataclasses

from llm.errors import InputError


@dataclasses.dataclass(frozen=True)
class DataSpec:
    """Where the text comes from, what is held out, and how it is packed.

    Attributes:
        train: a packaged corpus by name ("austen"), or a path: a folder, a .txt or a .jsonl file.
        validation: where validation documents come from, named like `train`; "" takes them out of `train`.
        holdout: ids of the documents of `train` that are held out; only used when `validation` is "".
        split_by: how documents are held out when neither of the two above says it: "hash" keeps out whole documents
            by the hash of their text, "tail" the last part of every document.
        validation_fraction: the share that `split_by` holds out.
        row_length: tokens in a packed row.
    """

    train: str = "austen"
    validation: str = ""
    holdout: tuple[str, ...] = ()
    split_by: str = "hash"
    validation_fraction: float = 0.1
    row_length: int = 128

    def __post_init__(self):
        if not self.train:
            raise InputError("data.train is empty: name a packaged corpus ('austen') or a path")
        if self.validation and self.holdout:
            raise InputError("data.validation and data.holdout are both set: one of them says what is held out")
        if self.split_by not in ("hash", "tail"):
            raise InputError(f"data.split_by={self.split_by!r}: there are 'hash' and 'tail'")
        if not 0 < self.validation_fraction < 1:
            raise InputError(f"data.validation_fraction={self.validation_fraction}: must lie between 0 and 1")
        if self.row_length < 2:
            raise InputError(f"data.row_length={self.row_length}: at least 2 tokens")
