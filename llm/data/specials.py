"""The ids that objectives put between the tokens of texts."""

import dataclasses
import functools

import numpy as np

from llm.errors import InputError


@dataclasses.dataclass(frozen=True, eq=False)
class Specials:
    """The ids that objectives put between the tokens of texts; None or () where the tokenizer has none.

    Attributes:
        vocab_size: ids lie below.
        end_of_text: closes a target.
        pad: stands at padding, where the end of text does otherwise.
        cls, sep, mask: BERT's.
        bos: opens the decoder's input, which the end of text does otherwise.
        opens: opens a document, which the end of text does otherwise.
        sentinels: stand for hidden spans, the highest id first whatever their order here.
        starts_word: (vocab_size,) bool, whether a token begins a word; None if the tokenizer cannot tell.
    """

    vocab_size: int
    end_of_text: int
    pad: int | None = None
    cls: int | None = None
    sep: int | None = None
    mask: int | None = None
    bos: int | None = None
    opens: int | None = None
    sentinels: tuple[int, ...] = ()
    starts_word: np.ndarray | None = None

    @functools.cached_property
    def ids(self) -> np.ndarray:
        """All special ids."""
        single = (self.end_of_text, self.pad, self.cls, self.sep, self.mask, self.bos)
        return np.unique([i for i in (*single, *self.sentinels) if i is not None])

    @functools.cached_property
    def ordinary(self) -> np.ndarray:
        """All other ids."""
        return np.setdiff1d(np.arange(self.vocab_size), self.ids)

    @property
    def fill(self) -> int:
        """What stands at padding."""
        return self.end_of_text if self.pad is None else self.pad

    @property
    def opening(self) -> int:
        """What opens a document."""
        return self.end_of_text if self.opens is None else self.opens

    @property
    def start(self) -> int:
        """What opens the decoder's input."""
        return self.end_of_text if self.bos is None else self.bos


def check_ids(key: str, ids: np.ndarray, size: int, hint: str = "prepare the data again by this tokenizer") -> None:
    """Raises InputError, naming key, row, place and id, unless all ids, rows first, lie in 0..size-1."""
    if ids.size and (ids.min() < 0 or ids.max() >= size):
        row, *place = np.argwhere((ids < 0) | (ids >= size))[0].tolist()
        at = f"row {row}, place {place[0]}" if place else f"row {row}"
        raise InputError(f"{key}, {at}: {int(ids[(row, *place)])} lies outside 0..{size - 1}; {hint}")
