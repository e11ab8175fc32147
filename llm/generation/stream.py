"""The text of a row as its tokens come."""

from collections.abc import Sequence
from typing import Protocol


class Decoder(Protocol):
    """Gives the text that each token completes, and at the end the rest (`llm.tokenization.StreamDecoder`)."""

    def push(self, token: int) -> str:
        """The text that one more token completes, perhaps none."""
        ...

    def flush(self) -> str:
        """The rest."""
        ...


class TextStream:
    """Text that ends before the first stop string, of which no part is ever shown.

    The pieces and the flush, joined, are the same however the text is cut into tokens: of stop strings that overlap
    the one that is complete first ends the text, of those that end together the longest.

    Attributes:
        text: all that was shown.
        stopped: whether a stop string came.
    """

    def __init__(self, decoder: Decoder, stops: Sequence[str] = ()):
        self.text, self.stopped = "", False
        self._decoder, self._stops, self._held = decoder, tuple(stops), ""

    def push(self, token: int) -> str:
        """The text that may be shown after one more token, perhaps none."""
        return "" if self.stopped else self._show(self._decoder.push(token), last=False)

    def flush(self) -> str:
        """The text that was held back because a stop string might have begun."""
        return "" if self.stopped else self._show(self._decoder.flush(), last=True)

    def _show(self, new: str, last: bool) -> str:
        self._held += new
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped, keep = True, min(found)[1]
        else:
            keep = len(self._held) if last else len(self._held) - self._begun()
        shown, self._held = self._held[:keep], self._held[keep:]
        self.text += shown
        return shown

    def _begun(self) -> int:
        """Characters at the end that may begin a stop string."""
        longest = max(map(len, self._stops), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0
