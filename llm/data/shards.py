"""Token shards: the ids of many documents in one memory-mapped file that says what it is.

    8 bytes   magic
    8 bytes   length of the header, little-endian
    header    JSON: version, dtype, documents, tokens, fields, labels, vocab_size, tokenizer, text_bytes, seed
    padding   to a multiple of 64 bytes
    offsets   int64 (documents x fields + 1): where each field of each document begins among the tokens
    labels    int32 (documents x labels)
    tokens    uint16, or uint32 where the vocabulary does not fit

Ids stand without special tokens: rows and objectives put those in.
"""

import array
import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Sequence

import numpy as np

from llm.errors import InputError

MAGIC, VERSION, ALIGNMENT = b"LLMTOKEN", 1, 64
_COUNTED = ("dtype", "documents", "tokens", "fields", "labels", "vocab_size", "tokenizer", "text_bytes", "seed")


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned dtype that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


class ShardWriter:
    """Writes one shard, document by document; the file appears on `close`, whole, and not at all without documents.

    Args:
        path: the file.
        vocab_size: ids are below it.
        fields: names of the sequences that every document has.
        labels: names of the integers that every document has.
        tokenizer: the fingerprint of the tokenizer.
        seed: of what was drawn at random on the way here.
    """

    def __init__(
        self,
        path: pathlib.Path,
        *,
        vocab_size: int,
        fields: Sequence[str],
        labels: Sequence[str] = (),
        tokenizer: str,
        seed: int = 0,
    ):
        self._path, self._dtype = path, token_dtype(vocab_size)
        self._header = {"vocab_size": vocab_size, "fields": list(fields), "labels": list(labels),
                        "tokenizer": tokenizer, "seed": seed}  # fmt: skip
        self._offsets, self._labels, self._text_bytes = array.array("q", [0]), array.array("i"), 0
        self._tokens_path = path.with_name(path.name + ".tokens-partial")
        self._tokens = self._tokens_path.open("wb")

    def add(
        self,
        sequences: Sequence[Sequence[int] | np.ndarray],
        labels: Sequence[int] = (),
        *,
        text_bytes: int = 0,
        name: str = "",
    ) -> None:
        """Adds a document: its ids by field, its labels, and the bytes of its text.

        Raises:
            InputError: an id outside the vocabulary; `name` says of which document.
        """
        if len(sequences) != len(self._header["fields"]) or len(labels) != len(self._header["labels"]):
            raise ValueError(f"{name}: expected fields {self._header['fields']} and labels {self._header['labels']}")
        for sequence in sequences:
            ids = np.asarray(sequence, np.int64)
            if len(ids) and not (0 <= ids.min() and ids.max() < self._header["vocab_size"]):
                wrong = ids[(ids < 0) | (ids >= self._header["vocab_size"])][0]
                raise InputError(
                    f"{name}: token id {wrong} is outside the vocabulary of {self._header['vocab_size']}; "
                    "the tokenizer does not fit its own vocabulary"
                )
            self._tokens.write(ids.astype(self._dtype).tobytes())
            self._offsets.append(self._offsets[-1] + len(ids))
        self._labels.extend(labels)
        self._text_bytes += text_bytes

    def close(self) -> None:
        """Writes the file."""
        self._tokens.close()
        fields = len(self._header["fields"])
        documents = (len(self._offsets) - 1) // fields
        if documents:
            header = {"version": VERSION, "dtype": self._dtype.name, "documents": documents,
                      "tokens": self._offsets[-1], "text_bytes": self._text_bytes, **self._header}  # fmt: skip
            encoded = json.dumps(header).encode()
            partial = self._path.with_name(self._path.name + ".partial")
            with partial.open("wb") as file:
                file.write(MAGIC + len(encoded).to_bytes(8, "little") + encoded)
                file.write(b"\0" * (-file.tell() % ALIGNMENT))
                self._offsets.tofile(file)
                self._labels.tofile(file)
                with self._tokens_path.open("rb") as tokens:
                    shutil.copyfileobj(tokens, file, 1 << 20)
            partial.replace(self._path)
        self._tokens_path.unlink()


@dataclasses.dataclass(frozen=True, eq=False)
class _Shard:
    header: dict
    offsets: np.ndarray
    labels: np.ndarray
    tokens: np.ndarray


class Shards:
    """Shards as one sequence of documents. Tokens and documents are numbered through all of them."""

    def __init__(self, shards: list[_Shard]):
        self._shards = shards
        self._starts = np.cumsum([0, *(len(s.tokens) for s in shards)])
        self._documents = np.cumsum([0, *(s.header["documents"] for s in shards)])
        first = shards[0].header
        self.fields: tuple[str, ...] = tuple(first["fields"])
        self.label_names: tuple[str, ...] = tuple(first["labels"])
        self.vocab_size: int = first["vocab_size"]
        self.tokenizer: str = first["tokenizer"]
        self.text_bytes: int = sum(s.header["text_bytes"] for s in shards)
        self.tokens: int = int(self._starts[-1])
        # (documents x fields + 1,) where each field begins among all tokens.
        self.offsets = np.concatenate(
            [s.offsets[:-1] + start for s, start in zip(shards, self._starts)] + [self._starts[-1:]]
        )

    @classmethod
    def open(cls, paths: Sequence[pathlib.Path]) -> "Shards":
        """Opens shards of one kind.

        Raises:
            InputError: a file that is no shard, is cut off, or was made by another tokenizer or with other fields.
        """
        if not paths:
            raise InputError("there is no token shard: no document is left for it")
        shards = [_open(path) for path in paths]
        for path, shard in zip(paths, shards):
            for key in ("dtype", "fields", "labels", "vocab_size", "tokenizer"):
                if shard.header[key] != shards[0].header[key]:
                    raise InputError(
                        f"{path} and {paths[0]} do not belong together: {key} {shard.header[key]!r} and "
                        f"{shards[0].header[key]!r}"
                    )
        return cls(shards)

    def __len__(self) -> int:
        return int(self._documents[-1])

    def lengths(self) -> np.ndarray:
        """(documents, fields) int64, the tokens of each field."""
        return np.diff(self.offsets).reshape(len(self), len(self.fields))

    def labels(self, documents: np.ndarray) -> np.ndarray:
        """(documents, labels) int32, the labels of these documents."""
        found = np.zeros((len(documents), len(self.label_names)), np.int32)
        where = np.searchsorted(self._documents, documents, side="right") - 1
        for shard in np.unique(where):
            here = where == shard
            found[here] = self._shards[shard].labels[documents[here] - self._documents[shard]]
        return found

    def sequence(self, document: int, field: int = 0) -> np.ndarray:
        """The ids of one field of a document, int32."""
        at = document * len(self.fields) + field
        start, end = int(self.offsets[at]), int(self.offsets[at + 1])
        shard = int(np.searchsorted(self._documents, document, side="right")) - 1
        base = int(self._starts[shard])
        return self._shards[shard].tokens[start - base : end - base].astype(np.int32)

    def take(self, places: np.ndarray) -> np.ndarray:
        """The ids at these places among all tokens, int32."""
        if len(self._shards) == 1:
            return self._shards[0].tokens[places].astype(np.int32)
        found = np.empty(places.shape, np.int32)
        where = np.searchsorted(self._starts, places, side="right") - 1
        for shard in np.unique(where):
            here = where == shard
            found[here] = self._shards[shard].tokens[places[here] - self._starts[shard]]
        return found

    def runs(self, begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """The ids of runs, each `lengths` long from its place among all tokens on, one behind the other, int32.

        What a run takes beyond the end of its shard is any id.
        """
        ends = np.cumsum(lengths)
        total = int(ends[-1]) if len(ends) else 0
        if not self.tokens:
            return np.zeros(total, np.int32)
        if len(self._shards) == 1:
            at = np.arange(total) + np.repeat(begins - (ends - lengths), lengths)
            return np.take(self._shards[0].tokens, at, mode="clip").astype(np.int32)
        found = np.zeros(total, np.int32)
        where = np.searchsorted(self._starts[1:-1], begins, side="right")
        local = begins - self._starts[where]
        used = np.unique(where)
        if len(begins) < 32 * len(used):  # few long runs of each shard: slices are cheaper than indices
            for shard, at, to, size in zip(where.tolist(), local.tolist(), (ends - lengths).tolist(), lengths.tolist()):
                run = self._shards[shard].tokens[at : at + size]
                found[to : to + len(run)] = run
            return found
        for shard in used:
            here = where == shard
            size = lengths[here]
            inside = np.arange(size.sum()) - np.repeat(np.cumsum(size) - size, size)
            at = np.repeat(local[here], size) + inside
            to = np.repeat((ends - lengths)[here], size) + inside
            found[to] = np.take(self._shards[shard].tokens, at, mode="clip")
        return found


def _open(path: pathlib.Path) -> _Shard:
    damaged = f"{path} is damaged or no token shard"
    try:
        with path.open("rb") as file:
            if file.read(8) != MAGIC:
                raise InputError(f"{damaged}: it does not begin with {MAGIC.decode()}")
            length = int.from_bytes(file.read(8), "little")
            if length > os.fstat(file.fileno()).st_size:
                raise InputError(f"{damaged}: it is cut off in its header")
            header = json.loads(file.read(length))
            begins = file.tell() + -file.tell() % ALIGNMENT
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{damaged}: {error}") from None
    missing = [key for key in _COUNTED if key not in header]
    if header.get("version") != VERSION or missing:
        raise InputError(f"{damaged}: version {header.get('version')}, expected {VERSION}, without {missing}")
    offsets = header["documents"] * len(header["fields"]) + 1
    labels = header["documents"] * len(header["labels"])
    dtype = np.dtype(header["dtype"])
    expected = begins + 8 * offsets + 4 * labels + dtype.itemsize * header["tokens"]
    if size != expected:
        raise InputError(f"{damaged}: it has {size:,} bytes, its header promises {expected:,}")
    tokens_at = begins + 8 * offsets + 4 * labels
    return _Shard(
        header,
        _mapped(path, np.int64, begins, (offsets,)),
        _mapped(path, np.int32, begins + 8 * offsets, (header["documents"], len(header["labels"]))),
        _mapped(path, dtype, tokens_at, (header["tokens"],)),
    )


def _mapped(path: pathlib.Path, dtype, begins: int, shape: tuple[int, ...]) -> np.ndarray:
    if 0 in shape:  # nothing cannot be mapped
        return np.zeros(shape, dtype)
    # A plain view: slicing a memmap itself costs several times as much.
    return np.memmap(path, dtype, "r", begins, shape).view(np.ndarray)
