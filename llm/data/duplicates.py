"""Which documents of a whole corpus are duplicates. One process decides, in one order, from a few bytes a document.

Documents are taken in an order that depends on nothing but themselves: those that evaluation needs first, then the
longest first, then by the hash of the text, then by the hash of the id. A document goes when it equals one that stays,
or is verified to be near one that stays. So of every cluster of linked documents at least one stays, a chain of weak
links joins nothing (what goes is near to what stays, not to what went), and neither the order of files nor the number
of workers nor Python's salted hashes can change the outcome.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from llm.data.dedup import jaccard


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """What is known of every document, one row each.

    Attributes:
        exact: (documents, 2) uint64, `exact_key`.
        length: (documents,) characters.
        text: (documents,) uint64, a hash of the text.
        id: (documents,) uint64, a hash of id and source.
        evaluation: (documents,) bool, whether it is from an evaluation source or held out by name; those always stay.
    """

    exact: np.ndarray
    length: np.ndarray
    text: np.ndarray
    id: np.ndarray
    evaluation: np.ndarray

    def order(self) -> np.ndarray:
        """(documents,) the rows in the order in which they are decided."""
        return np.lexsort((self.id, self.text, -self.length, ~self.evaluation))


@dataclasses.dataclass(frozen=True)
class Removal:
    """A document (row) that goes, the one that stays in its place, and their similarity."""

    document: int
    kept: int
    similarity: float


def exact_duplicates(table: Table) -> list[Removal]:
    """All but the first document of each group with one key."""
    order = table.order()
    keys = table.exact[order]
    # Stable: within a key, the order of deciding.
    by_key = np.lexsort((keys[:, 1], keys[:, 0]))
    same = np.zeros(len(order), bool)
    same[1:] = (keys[by_key][1:] == keys[by_key][:-1]).all(axis=1)
    removals, kept = [], -1
    for place, again in zip(by_key, same):
        document = int(order[place])
        if not again:
            kept = document
        elif not table.evaluation[document]:
            removals.append(Removal(document, kept, 1.0))
    return removals


def near_duplicates(
    table: Table,
    bands: Sequence[np.ndarray],
    alive: np.ndarray,
    shingles: Callable[[int], np.ndarray],
    threshold: float,
) -> tuple[list[Removal], int]:
    """Documents near to one that stays.

    Args:
        table: what is known of the documents.
        bands: parts of (bands, documents of the part) uint64, the key of every document in each band; 0 is no key.
        alive: (documents,) bool, those that exact duplication left.
        shingles: shingles(document) -> its shingles; only candidates are asked for.
        threshold: the least Jaccard similarity.

    Returns:
        the removals, and how many pairs were compared.
    """
    groups: dict[int, list[int]] = {}  # document -> the buckets it shares with another
    buckets = 0
    for b in range(len(bands[0])):
        keys = np.where(alive, np.concatenate([part[b] for part in bands]), 0)
        _, bucket, count = np.unique(keys, return_inverse=True, return_counts=True)
        shared = np.flatnonzero((count[bucket] > 1) & (keys != 0))
        for document, group in zip(shared.tolist(), (bucket[shared] + buckets).tolist()):
            groups.setdefault(document, []).append(group)
        buckets += len(count)
    stays: dict[int, list[int]] = {}  # bucket -> its documents that stay
    removals, compared = [], 0
    for document in table.order().tolist():
        if document not in groups:
            continue
        found = None
        if not table.evaluation[document]:
            seen: set[int] = set()
            for group in groups[document]:
                for other in stays.get(group, ()):
                    if other in seen:
                        continue
                    seen.add(other)
                    compared += 1
                    similarity = jaccard(shingles(document), shingles(other))
                    if similarity >= threshold:
                        found = Removal(document, other, similarity)
                        break
                if found:
                    break
        if found:
            removals.append(found)
        else:
            for group in groups[document]:
                stays.setdefault(group, []).append(document)
    return removals, compared


def frequent(parts: list[np.ndarray], more_than: int, slices: int = 16) -> np.ndarray:
    """Sorted keys that stand in more than `more_than` documents.

    Args:
        parts: sorted uint64 arrays (memory-mapped), each key as often as documents of that part have it.
        more_than: documents.
        slices: the key range is counted in that many slices, one in memory at a time.
    """
    borders = [int(k * 2**64 // slices) for k in range(slices)] + [2**64 - 1]
    found = []
    for low, high in zip(borders[:-1], borders[1:]):
        taken = [
            part[np.searchsorted(part, np.uint64(low)) : np.searchsorted(part, np.uint64(high), side="right")]
            for part in parts
        ]
        keys, count = np.unique(np.concatenate(taken) if taken else np.empty(0, np.uint64), return_counts=True)
        found.append(keys[(count > more_than) & (keys != 0)])
    return np.unique(np.concatenate(found))
