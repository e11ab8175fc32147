"""Seeded augmentation of training examples: the operations of EDA (Wei and Zou 2019) on token ids.

Three of its four operations need nothing but the text, and one of them, random insertion, takes its words from the text
itself. Synonyms need a thesaurus, which is not shipped, so there is no replacement by synonyms.
"""

from collections.abc import Callable, Sequence

import numpy as np

Words = list[np.ndarray]


def swap(words: Words, rate: float, rng: np.random.Generator) -> Words:
    """Exchanges two words at random places, rate * n times (rounded, at least once)."""
    words = list(words)
    if len(words) < 2:
        return words
    for _ in range(_times(words, rate)):
        a, b = rng.choice(len(words), 2, replace=False)
        words[a], words[b] = words[b], words[a]
    return words


def delete(words: Words, rate: float, rng: np.random.Generator) -> Words:
    """Deletes each word with probability `rate`; when that would leave none, one at random stays."""
    kept = [word for word, draw in zip(words, rng.random(len(words))) if draw >= rate]
    return kept or [words[rng.integers(len(words))]]


def repeat(words: Words, rate: float, rng: np.random.Generator) -> Words:
    """Inserts a copy of a random word at a random place, rate * n times (rounded, at least once)."""
    grown = list(words)
    for _ in range(_times(words, rate)):
        grown.insert(rng.integers(len(grown) + 1), words[rng.integers(len(words))])
    return grown


OPERATIONS: dict[str, Callable[[Words, float, np.random.Generator], Words]] = {
    "swap": swap, "delete": delete, "repeat": repeat,
}  # fmt: skip


def _times(words: Words, rate: float) -> int:
    return max(round(rate * len(words)), 1)


def augment(
    tokens: np.ndarray,
    operations: Sequence[str],
    rate: float,
    rng: np.random.Generator,
    starts_word: np.ndarray | None = None,
) -> np.ndarray:
    """The ids of an example after these operations, one after the other; a function of its arguments alone.

    Args:
        tokens: (n,) ids without special tokens. None of them stays none, and some never become none.
        operations: names of OPERATIONS.
        rate: the share of words that each operation touches; 0 changes nothing.
        rng: says what happens.
        starts_word: bool by id, whether a token begins a word; None makes each token a word.
    """
    if not len(tokens) or not rate:
        return tokens
    begins = np.ones(len(tokens), bool) if starts_word is None else starts_word[tokens]
    words = np.split(tokens, np.flatnonzero(begins[1:]) + 1)
    for name in operations:
        words = OPERATIONS[name](words, rate, rng)
    return np.concatenate(words)
