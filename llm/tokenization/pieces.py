"""From entries of the vocabulary to bytes of text."""

import functools
import re
import unicodedata

import numpy as np

SPACE = "\u2581"  # SentencePiece writes a space so
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_of() -> dict[str, int]:
    """The byte that each character of byte-level BPE stands for (the table of GPT-2, Radford et al. 2019).

    Printable Latin-1 characters stand for themselves; the other bytes, in order, for the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTE_OF = _byte_of()
CHARACTER_OF = {byte: character for character, byte in BYTE_OF.items()}


def byte_level(data: bytes) -> str:
    """How byte-level BPE writes bytes."""
    return "".join(CHARACTER_OF[byte] for byte in data)


class Pieces:
    """Joins the entries of a vocabulary to text.

    Attributes:
        style: how entries spell text: "byte_level", GPT-2's characters for bytes; "wordpiece", words with spaces
            between them, where an entry with the prefix goes on with the word before; "metaspace", U+2581 for a space;
            "plain". In the last two `<0x41>` is a byte.
        prefix: what marks an entry that goes on with a word, "##".
        added_space: where encoding puts a space that no text has, and decoding takes it away: "always" (at the start
            and after each special token), "first" (at the start) or "never".
    """

    def __init__(self, entries: list[str | None], literal: set[int], special: set[int], style: str, prefix: str = "##",
                 added_space: str = "never", byte_ids: set[int] | None = None):  # fmt: skip
        self.entries, self.special, self.style = entries, special, style
        self.prefix, self.added_space = prefix, added_space
        self._literal, self._byte_ids = literal, byte_ids

    def _continues(self, i: int) -> bool:
        piece = self.entries[i]
        return piece is not None and i not in self._literal and piece.startswith(self.prefix) and piece != self.prefix

    @functools.cached_property
    def spelled(self) -> list[bytes | None]:
        """The bytes of each entry, without the spaces between words."""
        return [None if piece is None else self._spell(i, piece) for i, piece in enumerate(self.entries)]

    def _spell(self, i: int, piece: str) -> bytes:
        if i in self._literal:
            return piece.encode()
        if self.style == "byte_level":
            if all(character in BYTE_OF for character in piece):
                return bytes(BYTE_OF[character] for character in piece)
            return piece.encode()
        if self.style == "wordpiece":
            return (piece[len(self.prefix) :] if self._continues(i) else piece).encode()
        byte = _BYTE.fullmatch(piece)
        if byte and (self._byte_ids is None or i in self._byte_ids):
            return bytes([int(byte[1], 16)])
        return (piece.replace(SPACE, " ") if self.style == "metaspace" else piece).encode()

    @functools.cached_property
    def missing_bytes(self) -> bytes:
        """The bytes that a byte-level vocabulary cannot spell, which its library would leave out in silence."""
        if self.style != "byte_level":
            return b""
        present = set(self.entries)
        return bytes(byte for character, byte in BYTE_OF.items() if character not in present)

    @functools.cached_property
    def glued(self) -> np.ndarray:
        """Entries that go on with the word before, bool (vocabulary,); of wordpiece alone."""
        return np.array([self._continues(i) for i in range(len(self.entries))])

    @functools.cached_property
    def starts_word(self) -> np.ndarray:
        """Which entries begin a word, bool (vocabulary,)."""
        starts = np.ones(len(self.entries), bool)
        for i, data in enumerate(self.spelled):
            if data is None or i in self._literal:
                continue
            if self.style == "wordpiece":
                starts[i] = not self.glued[i]
                continue
            if data and data[0] >= 0x80 and data.decode("utf-8", errors="replace")[:1] == "\ufffd":
                starts[i] = False  # a part of a character
                continue
            first = data.decode("utf-8", errors="replace")[:1]
            starts[i] = first.isspace() or unicodedata.category(first)[0] in "PSCZ" if first else False
        return starts


class Joiner:
    """Joins the bytes of ids that come one at a time."""

    def __init__(self, pieces: Pieces):
        self._pieces = pieces
        self._begun = False  # a token has come, and the next word needs a space before it
        self._may_strip = pieces.added_space != "never"

    def push(self, i: int) -> bytes:
        """The bytes that one more id adds; the id is of the vocabulary."""
        pieces = self._pieces
        data = pieces.spelled[i]
        assert data is not None
        if pieces.style == "wordpiece":
            if self._begun and not pieces.glued[i]:
                data = b" " + data
            self._begun = True
        elif pieces.style == "metaspace":
            if i in pieces.special:
                self._may_strip = self._may_strip or pieces.added_space == "always"
            else:
                if self._may_strip and data.startswith(b" "):
                    data = data[1:]
                self._may_strip = False
        return data
