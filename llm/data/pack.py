"""Packing: which pieces of which documents fill each row. Nothing is lost or doubled, and no target crosses a border.

A document of n tokens has n + 1 places: its inputs are the end of text and its tokens, its targets its tokens and the
end of text. So every token is predicted once, the first from the end of text alone. A piece is a run of places.
"""

import bisect
import dataclasses
import pathlib

import numpy as np

from llm.data.shards import Shards


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """The pieces of every row: those of row r are `splits[r]` to `splits[r + 1]`.

    Attributes:
        row_length: places in a row; the pieces of a row fill no more.
        splits: (rows + 1,) int64.
        document, start, length: (pieces,) int64: the document, its first place in the piece, and how many.
    """

    row_length: int
    splits: np.ndarray
    document: np.ndarray
    start: np.ndarray
    length: np.ndarray

    def __len__(self) -> int:
        return len(self.splits) - 1

    @property
    def tokens(self) -> int:
        """Targets in all rows."""
        return int(self.length.sum())

    def save(self, path: pathlib.Path) -> None:
        """Writes the plan."""
        partial = path.with_name(path.name + ".partial")
        with partial.open("wb") as file:
            np.savez(file, row_length=self.row_length, **{name: getattr(self, name) for name in _ARRAYS})
        partial.replace(path)

    @classmethod
    def load(cls, path: pathlib.Path) -> "Plan":
        """Reads what `save` wrote."""
        with np.load(path) as arrays:
            return cls(int(arrays["row_length"]), *(arrays[name] for name in _ARRAYS))


_ARRAYS = ("splits", "document", "start", "length")


def plan(packing: str, lengths: np.ndarray, row_length: int) -> Plan:
    """The rows of documents of these lengths (tokens), by "concatenate" or "best_fit"."""
    return {"concatenate": concatenate, "best_fit": best_fit}[packing](np.asarray(lengths, np.int64), row_length)


def concatenate(lengths: np.ndarray, row_length: int) -> Plan:
    """Joins the documents and cuts the stream into rows; only the last row is not full."""
    size = lengths + 1
    ends = np.cumsum(size)
    begins = ends - size
    first_row = begins // row_length
    pieces = (ends - 1) // row_length - first_row + 1  # rows that a document touches
    document = np.repeat(np.arange(len(size)), pieces)
    row = np.repeat(first_row, pieces) + _within(pieces)
    begin = np.maximum(row * row_length, begins[document])
    length = np.minimum((row + 1) * row_length, ends[document]) - begin
    rows = -(-int(size.sum()) // row_length)
    splits = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=rows))]).astype(np.int64)
    return Plan(row_length, splits, document, begin - begins[document], length)


def best_fit(lengths: np.ndarray, row_length: int) -> Plan:
    """Keeps documents whole where they fit into a row: best-fit decreasing (Ding et al. 2024, arXiv 2404.10830).

    A longer document first fills rows of its own; its rest is placed like any other. Documents of one size are placed
    together: in a row with room c, c // size of them, which is what placing them one by one does too.
    """
    size = lengths + 1
    full, rest = np.divmod(size, row_length)
    whole_document = np.repeat(np.arange(len(size)), full)
    whole_start = (np.arange(len(whole_document)) - np.repeat(np.cumsum(full) - full, full)) * row_length
    whole_rows = len(whole_document)

    row_of = np.full(len(size), -1, np.int64)
    order = np.argsort(-rest, kind="stable")
    order = order[rest[order] > 0]
    rooms: dict[int, list[np.ndarray]] = {}  # room left -> rows with that much, oldest first
    sorted_rooms: list[int] = []  # the keys of `rooms`
    rows = whole_rows

    def put(room: int, which: np.ndarray) -> None:
        if room and len(which):
            if room not in rooms:
                rooms[room] = []
                bisect.insort(sorted_rooms, room)
            rooms[room].append(which)

    # The documents of one size, largest size first.
    counts = np.bincount(rest, minlength=row_length)
    counts[0] = 0
    sizes = np.flatnonzero(counts)[::-1]
    for length, waiting in zip(sizes.tolist(), np.split(order, np.cumsum(counts[sizes])[:-1])):
        while len(waiting):
            place = bisect.bisect_left(sorted_rooms, length)
            if place < len(sorted_rooms):
                room = sorted_rooms.pop(place)
                found = np.concatenate(rooms.pop(room))
            else:
                room = row_length
                found = np.arange(rows, rows + -(-len(waiting) // (room // length)))
                rows += len(found)
            each = room // length
            used = min(len(found), -(-len(waiting) // each))
            filled = np.repeat(found[:used], each)[: len(waiting)]
            row_of[waiting[: len(filled)]] = filled
            waiting = waiting[len(filled) :]
            in_last = len(filled) - (used - 1) * each
            put(room - each * length, found[: used - 1])
            put(room - in_last * length, found[used - 1 : used])
            put(room, found[used:])

    document = np.concatenate([whole_document, order])
    start = np.concatenate([whole_start, full[order] * row_length])
    length = np.concatenate([np.full(whole_rows, row_length, np.int64), rest[order]])
    row = np.concatenate([np.arange(whole_rows), row_of[order]])
    by_row = np.argsort(row, kind="stable")
    splits = np.searchsorted(row[by_row], np.arange(rows + 1))
    return Plan(row_length, splits, document[by_row], start[by_row], length[by_row])


def rows(packed: Plan, shards: Shards, indices: np.ndarray, end_of_text: int, opening: int) -> dict[str, np.ndarray]:
    """The rows at `indices`; `opening` opens a document, the end of text closes it.

    Returns:
        tokens, targets: (rows, row_length) int32; the end of text at padding.
        segments: (rows, row_length) int32, 1, 2, ... for the pieces of a row, 0 for padding.
        positions: (rows, row_length) int32, 0, 1, ... within each piece, and within the padding.
    """
    shape = (len(indices), packed.row_length)
    counts = packed.splits[indices + 1] - packed.splits[indices]
    pieces = np.repeat(packed.splits[indices], counts) + _within(counts)
    start, length, document = packed.start[pieces], packed.length[pieces], packed.document[pieces]
    begin, size = shards.offsets[document], shards.offsets[document + 1] - shards.offsets[document]
    closes, number = start + length > size, _within(counts) + 1
    begin = begin + start
    # Padding is a piece like any other, of segment 0: all rows are full then, and their places one run.
    used = np.bincount(np.repeat(np.arange(len(indices)), counts), length, minlength=len(indices)).astype(np.int64)
    short = np.flatnonzero(used < packed.row_length)
    if len(short):
        after = np.cumsum(counts)[short]
        begin, start, number = (np.insert(x, after, 0) for x in (begin, start, number))
        length, closes = np.insert(length, after, packed.row_length - used[short]), np.insert(closes, after, False)
    first = np.cumsum(length) - length
    # Place p of a document has token p for its target and token p - 1 for its input: the target before it, but for the
    # first place of a piece. A last target beyond the document is the end of text.
    targets = shards.runs(begin, length)
    tokens = np.empty_like(targets)
    tokens[1:] = targets[:-1]
    opens = start == 0
    tokens[first[opens]] = opening
    tokens[first[~opens]] = shards.take(begin[~opens] - 1)
    targets[first[closes] + length[closes] - 1] = end_of_text
    segments = np.repeat(number.astype(np.int32), length)
    if len(short):
        tokens[segments == 0] = targets[segments == 0] = end_of_text
    positions = np.arange(len(targets), dtype=np.int32) - np.repeat(first.astype(np.int32), length)
    made = {"tokens": tokens, "targets": targets, "segments": segments, "positions": positions}
    return {name: value.reshape(shape) for name, value in made.items()}


def _within(counts: np.ndarray) -> np.ndarray:
    """0, 1, ..., counts[0] - 1, 0, 1, ..., counts[1] - 1, ..."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)
