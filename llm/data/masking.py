"""What masked language models and span corruption hide: pure functions of tokens and generators of random numbers."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

MASKED, RANDOM = 0.8, 0.1  # of the chosen places; the rest keeps its token


def word_starts(tokens_BT: np.ndarray, eligible_BT: np.ndarray, starts_word_V: np.ndarray) -> np.ndarray:
    """The place where the word of each place begins, (B, T).

    A word begins at a token that says so, at the first eligible place of a row, and after a place that is not eligible
    (a special token, padding).
    """
    begins = starts_word_V[tokens_BT]
    begins[:, 1:] |= ~eligible_BT[:, :-1]
    begins[:, :1] = True
    return np.maximum.accumulate(np.where(begins, np.arange(tokens_BT.shape[1]), 0), axis=1)


def mask_tokens(
    tokens_BT: np.ndarray,
    eligible_BT: np.ndarray,
    rate: float,
    mask_id: int,
    ordinary_ids: np.ndarray,
    rngs: Sequence[np.random.Generator],
    starts_BT: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """BERT's corruption (Devlin et al. 2019): of the chosen places 80 % get the mask, 10 % a random token, 10 % none.

    Each eligible place is chosen by itself with probability `rate`, so a short row may have none.

    Args:
        tokens_BT: the text.
        eligible_BT: bool, the places that may be chosen.
        rate: the probability.
        mask_id: the mask.
        ordinary_ids: what a random token is drawn from, uniformly.
        rngs: one a row.
        starts_BT: the place where each place's word begins; a word is chosen as a whole, with the same probability.

    Returns:
        (corrupted tokens of the dtype of `tokens_BT`, bool: chosen), both (B, T).
    """
    length = tokens_BT.shape[1]
    draws = np.array([rng.random((2, length)) for rng in rngs]).reshape(-1, 2, length)
    choice_BT, action_BT = draws[:, 0], draws[:, 1]
    random_BT = np.array([rng.integers(len(ordinary_ids), size=length) for rng in rngs], np.int64).reshape(-1, length)
    if starts_BT is not None:
        choice_BT = np.take_along_axis(choice_BT, starts_BT, axis=1)
    chosen_BT = eligible_BT & (choice_BT < rate)
    corrupted_BT = np.where(chosen_BT & (action_BT < MASKED), mask_id, tokens_BT)
    replaced_BT = chosen_BT & (action_BT >= MASKED) & (action_BT < MASKED + RANDOM)
    corrupted_BT = np.where(replaced_BT, ordinary_ids[random_BT], corrupted_BT)
    return corrupted_BT.astype(tokens_BT.dtype), chosen_BT


# --- span corruption --------------------------------------------------------------------------------------------------


def span_counts(length: int, density: float, mean_span: float) -> tuple[int, int]:
    """(tokens hidden, spans they form) in a text of `length` tokens, as T5 counts them (Raffel et al. 2020).

    At least one token is hidden and one stays. T5's count fails where there are more spans than tokens to stand between
    them (density .55, spans of 1); here spans are then as many as fit. A text of one token is left whole.
    """
    if length < 2:
        return 0, 0
    noise = min(max(round(length * density), 1), length - 1)
    spans = max(round(noise / mean_span), 1)
    return noise, min(spans, noise, length - noise + 1)


def span_lengths(row_length: int, density: float, mean_span: float) -> tuple[int, int]:
    """(source length, target length) that hold a row of up to `row_length` tokens, each with its end of text.

    Those of T5's `random_spans_helper`: a row of 568 at density .15 and mean span 3 makes 512 and 114. Both grow with
    the row, so a shorter text fits.
    """
    noise, spans = span_counts(row_length, density, mean_span)
    return row_length - noise + spans + 1, noise + spans + 1


def span_mask(length: int, density: float, mean_span: float, rng: np.random.Generator) -> np.ndarray:
    """Bool (length,), True where a token is hidden: any mask with the `span_counts` is equally likely.

    T5 always starts with a kept and ends with a hidden span, so it loses every short text's tail and never its head;
    here a text may begin and end with either.
    """
    noise, spans = span_counts(length, density, mean_span)
    if not noise:
        return np.zeros(length, bool)
    hidden = _composition(noise, spans, rng)
    # The outer two of the kept runs may be empty: draw each one longer, then take one off.
    kept = _composition(length - noise + 2, spans + 1, rng)
    kept[[0, -1]] -= 1
    runs = np.empty(2 * spans + 1, np.int64)
    runs[0::2], runs[1::2] = kept, hidden
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs)


def _composition(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """`total` as a sum of `parts` positive numbers, every one equally likely."""
    cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(cuts, prepend=0, append=total)


class Corrupted(NamedTuple):
    """A text without its hidden spans, and the spans: ids, the document of each, and what counts of the targets."""

    source: np.ndarray
    source_documents: np.ndarray
    target: np.ndarray
    target_documents: np.ndarray
    counts: np.ndarray


def corrupt_spans(
    tokens: np.ndarray, documents: np.ndarray, hidden: np.ndarray, sentinels: np.ndarray, told: np.ndarray
) -> Corrupted:
    """Replaces each hidden span by the next sentinel; the target is each sentinel followed by its span.

    A span belongs to the document in which it begins. What it hides of a following document stands in the target, so
    that both together rebuild the text, but does not count: no document is predicted from another.

    Args:
        tokens: (n,) ids.
        documents: (n,) the document of each.
        hidden: (n,) bool.
        sentinels: at least as many ids as there are spans.
        told: (n,) bool, what counts where it is hidden.
    """
    begins = hidden.copy()
    begins[1:] &= ~hidden[:-1]
    span = np.cumsum(begins) - 1
    kept = ~hidden | begins
    firsts = np.flatnonzero(begins)
    source = np.where(begins, sentinels[np.maximum(span, 0)], tokens)[kept]

    inside = np.flatnonzero(hidden)
    at_token = np.arange(len(inside)) + span[inside] + 1
    at_sentinel = at_token[np.searchsorted(inside, firsts)] - 1
    size = len(inside) + len(firsts)
    target, target_documents = np.empty(size, tokens.dtype), np.empty(size, documents.dtype)
    counts = np.ones(size, bool)
    owner = documents[firsts]
    target[at_token], target_documents[at_token] = tokens[inside], owner[span[inside]]
    target[at_sentinel], target_documents[at_sentinel] = sentinels[: len(firsts)], owner
    counts[at_token] = (documents[inside] == owner[span[inside]]) & told[inside]
    return Corrupted(source, documents[kept], target, target_documents, counts)
