"""What each id stands for: the bytes it gives, in the middle of a text and at its start."""

import dataclasses
import json
import re
from collections.abc import Sequence

import numpy as np

from llm.errors import InputError

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# Scripts that put no space between words, so that any of their letters may start one: Thai to Burmese, Khmer, kana and
# Han (U+3000 to U+9FFF, compatibility forms, and the planes of rare characters).
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3000-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")


@dataclasses.dataclass(frozen=True)
class Special:
    """A special token: its id, and whether it takes the blanks to its left and right with it."""

    id: int
    lstrip: bool = False
    rstrip: bool = False


@dataclasses.dataclass(frozen=True)
class Pieces:
    """The vocabulary by id.

    Attributes:
        start: bytes of each id as the first of a text; None where the id is not assigned.
        middle: bytes of each id after another.
        special: special tokens by their text.
        continues: which ids a tokenizer marks as going on with a word; None where only the bytes can say it.
    """

    start: list[bytes | None]
    middle: list[bytes | None]
    special: dict[str, Special]
    continues: np.ndarray | None = None

    def starts_word(self) -> np.ndarray:
        """[V] bool: whether a piece starts a word when another comes before it.

        A piece goes on with a word when its tokenizer marks it so (##), or else when its first character is a letter,
        digit or combining mark of a script that puts spaces between words, or an inner byte of a character. Special
        tokens start.
        """
        if self.continues is not None:
            starts = ~self.continues
        else:
            starts = np.array([piece is None or _starts(piece) for piece in self.middle], bool)
        starts[[special.id for special in self.special.values()]] = True
        return starts


def _starts(piece: bytes) -> bool:
    for length in range(1, min(4, len(piece)) + 1):
        try:
            first = piece[:length].decode()
        except UnicodeDecodeError:
            continue
        return not (first.isalnum() or _is_mark(first)) or bool(_UNSPACED.match(first))
    # An unfinished character: the first bytes E3 to E9 open U+3000 to U+9FFF, F0 A0 and on the planes of Han.
    return bool(piece) and (0xE3 <= piece[0] <= 0xE9 or piece[:1] == b"\xf0" and piece[1:2] >= b"\xa0")


def _is_mark(character: str) -> bool:
    import unicodedata

    return unicodedata.category(character).startswith("M")


def _byte_of() -> dict[str, int]:
    """The byte that each character of byte-level BPE stands for (the table of GPT-2, Radford et al. 2019).

    Printable Latin-1 characters stand for themselves; the other bytes, in order, for the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTE_OF = _byte_of()
CHARACTER_OF = {byte: character for character, byte in BYTE_OF.items()}


def decoded(tokens: Sequence[str | None], literal: set[int], decoder: str) -> tuple[list, list, np.ndarray | None]:
    """The bytes of tokens as a decoder of Hugging Face's `tokenizers` gives them.

    Args:
        tokens: the token of each id.
        literal: ids that stand for their own text (added tokens).
        decoder: the decoder as JSON.

    Returns:
        `start`, `middle` and `continues` of `Pieces`.

    Raises:
        InputError: the decoder needs more than one token at a time.
    """
    steps = _steps(json.loads(decoder))
    start: list[bytes | None] = []
    middle: list[bytes | None] = []
    for i, token in enumerate(tokens):
        if token is None or i in literal:
            text = None if token is None else token.encode()
            start.append(text)
            middle.append(text)
        else:
            start.append(_piece(token, steps, True))
            middle.append(_piece(token, steps, False))
    prefixes = [step["prefix"] for step in steps if step["type"] == "WordPiece"]
    if not prefixes:
        return start, middle, None
    marked = [token is not None and i not in literal and token.startswith(prefixes[0]) for i, token in enumerate(tokens)]
    return start, middle, np.array(marked, bool)


def _steps(decoder: dict) -> list[dict]:
    if decoder["type"] == "Sequence":
        steps = [step for part in decoder["decoders"] for step in _steps(part)]
    else:
        steps = [decoder]
    fused = False
    for step in steps:
        kind = step["type"]
        fused |= kind == "Fuse"
        readable = kind in ("ByteLevel", "WordPiece", "Metaspace", "ByteFallback", "Fuse")
        readable |= kind == "Replace" and "String" in step["pattern"]
        readable |= kind == "Strip" and step["stop"] == 0 and fused
        if not readable:
            raise InputError(f"the tokenizer's decoder {json.dumps(step)} is not supported: there are ByteLevel, "
                             "WordPiece, Metaspace, ByteFallback, Fuse, Replace of a string, Strip at the start")  # fmt: skip
    return steps


def _piece(token: str, steps: list[dict], first: bool) -> bytes:
    text = token
    for step in steps:
        kind = step["type"]
        if kind == "ByteLevel":
            if all(character in BYTE_OF for character in text):
                return bytes(BYTE_OF[character] for character in text)
        elif kind == "WordPiece":
            if text.startswith(step["prefix"]):
                text = text[len(step["prefix"]) :]
            elif not first:
                text = " " + text
            text = _tidy(text) if step["cleanup"] else text
        elif kind == "Metaspace":
            text = text.replace(step["replacement"], " ")
            if first and step["prepend_scheme"] != "never":
                text = text.removeprefix(" ")
        elif kind == "Replace":
            text = text.replace(step["pattern"]["String"], step["content"])
        elif kind == "ByteFallback" and (match := _BYTE.fullmatch(text)):
            return bytes([int(match[1], 16)])
        elif kind == "Strip" and first:
            for _ in range(step["start"]):
                text = text.removeprefix(step["content"])
    return text.encode()


def _tidy(text: str) -> str:
    """No space before a punctuation mark that closes or joins."""
    return text[1:] if text in (" .", " ?", " !", " ,") else text


def sentencepiece_pieces(model, special: dict[str, Special]) -> Pieces:
    """The vocabulary of a `sentencepiece.SentencePieceProcessor`, and special tokens put on top of it."""
    size = model.get_piece_size()
    # A model that puts a space before the text takes it away when decoding.
    prefixed = model.decode_pieces(["\u2581a"]) == "a"
    middle: list[bytes | None] = []
    start: list[bytes | None] = []
    for i in range(size):
        piece = model.id_to_piece(i)
        match = _BYTE.fullmatch(piece) if model.is_byte(i) else None
        text = bytes([int(match[1], 16)]) if match else piece.replace("\u2581", " ").encode()
        middle.append(text)
        start.append(text.removeprefix(b" ") if prefixed else text)
        if model.is_control(i) or model.is_unknown(i):
            special = special | {piece: Special(i)}
    start, middle = placed(start, middle, special)
    return Pieces(start, middle, special)


def placed(start: list, middle: list, special: dict[str, Special]) -> tuple[list, list]:
    """Both tables with the texts of special tokens in them, made longer where their ids need it."""
    size = max([len(middle), *(token.id + 1 for token in special.values())])
    start, middle = ([*table, *[None] * (size - len(table))] for table in (start, middle))
    for text, token in special.items():
        start[token.id] = middle[token.id] = text.encode()
    return start, middle
