"""Special tokens: what they are called, what they are for, and where they stand in a text."""

import dataclasses
import functools
import re

from llm.errors import InputError

END_OF_TEXT = "<|endoftext|>"

BERT = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

# What each role is called where a file does not say; the first name that the vocabulary has is taken.
NAMES = {
    "end_of_text": (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "[EOS]", "[SEP]"),
    "pad": ("[PAD]", "<pad>", "<|pad|>", "<|padding|>"),
    "unk": ("[UNK]", "<unk>"),
    "cls": ("[CLS]", "<cls>"),
    "sep": ("[SEP]", "<sep>"),
    "mask": ("[MASK]", "<mask>"),
    "bos": ("<s>", "<bos>", "[BOS]", "<|begin_of_text|>"),
}

_SENTINEL = re.compile(r"<extra_id_(\d+)>")


@dataclasses.dataclass(frozen=True)
class Special:
    """A special token: its id, and whether it takes the spaces on its left or right with it."""

    id: int
    lstrip: bool = False
    rstrip: bool = False


class Splitter:
    """Finds special tokens in text."""

    def __init__(self, specials: dict[str, Special]):
        self.specials = specials

    @functools.cached_property
    def _pattern(self) -> re.Pattern:
        longest_first = sorted(self.specials, key=lambda token: (-len(token), token))
        return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    def __call__(self, text: str) -> list[str | int]:
        """The parts of a text in order: ids of special tokens, and the text between them, never empty."""
        if not self.specials:
            return [text] if text else []
        parts: list[str | int] = []
        strip_next = False
        pieces = self._pattern.split(text)
        for place in range(0, len(pieces), 2):
            between = pieces[place].lstrip() if strip_next else pieces[place]
            special = self.specials[pieces[place + 1]] if place + 1 < len(pieces) else None
            if special and special.lstrip:
                between = between.rstrip()
            if between:
                parts.append(between)
            if special:
                parts.append(special.id)
                strip_next = special.rstrip
        return parts


def sentinels(ids: dict[str, int]) -> tuple[int, ...]:
    """The ids of <extra_id_0>, <extra_id_1>, ... among tokens."""
    found = {int(match[1]): i for token, i in ids.items() if (match := _SENTINEL.fullmatch(token))}
    return tuple(found[n] for n in range(len(found)) if n in found)


def sentinel_tokens(count: int) -> list[str]:
    """Sentinels in the order of their ids: <extra_id_0> has the highest."""
    return [f"<extra_id_{n}>" for n in reversed(range(count))]


def additions(ids: dict[str, int], tokens: tuple[str, ...], count: int, where: str) -> list[str]:
    """The special tokens that a loaded vocabulary lacks, in the order of their new ids, sentinels last."""
    new = [token for token in tokens if token not in ids]
    present = len(sentinels(ids))
    if present >= count:
        if new and present:
            raise InputError(
                f"tokenizer.special_tokens: {where} has sentinels at its highest ids, {new[0]!r} finds no place"
            )
        return new
    if present:
        raise InputError(f"tokenizer.sentinels={count}: {where} has {present} of its own; set {present} or fewer")
    return new + sentinel_tokens(count)
