"""What is known of a document for finding its duplicates, and the stages that need no other document.

Shingles are hashes of n consecutive words (`normalised_words`: case, punctuation and blank space do not count, a Han
character is a word). A document of fewer than n words has one shingle, all of its words, so it equals only the same
words; a document without words has none and equals nothing.
"""

import functools
import hashlib
from collections.abc import Sequence

import numpy as np

from llm.data.documents import Document, Dropped, Note, Stage
from llm.data.spec import DedupSpec
from llm.data.word_units import normalised_words

SEED = 1  # of the signatures; fixed, so that a document has the same one in every run


def hash_text(text: str) -> int:
    """64 bits, the same in every process (XXH3)."""
    import xxhash

    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"))


class _Hashes(dict):
    """Word -> 64-bit hash, remembered for the words that come again."""

    LIMIT = 500_000

    def __missing__(self, word: str) -> int:
        if len(self) >= self.LIMIT:
            self.clear()
        self[word] = value = hash_text(word)
        return value


_HASHES = _Hashes()


def hash_words(words: Sequence[str]) -> np.ndarray:
    """(words,) uint64, a hash of each word."""
    return np.fromiter(map(_HASHES.__getitem__, words), np.uint64, len(words))


def ngrams(hashes: np.ndarray, n: int) -> np.ndarray:
    """(words - n + 1,) uint64, a hash of each n consecutive words; none of fewer than n words."""
    count = len(hashes) - n + 1
    if count < 1:
        return np.empty(0, np.uint64)
    combined = np.zeros(count, np.uint64)
    for k in range(n):
        # Fibonacci hashing between words: the order of words counts.
        combined = (combined ^ hashes[k : k + count]) * np.uint64(0x9E3779B97F4A7C15)
        combined ^= combined >> np.uint64(29)
    return combined


def shingles(text: str, n: int) -> np.ndarray:
    """The distinct shingles of a text, sorted uint64."""
    hashes = hash_words(normalised_words(text))
    return np.unique(ngrams(hashes, min(n, len(hashes)))) if len(hashes) else np.empty(0, np.uint64)


def among(values: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Which values stand among sorted keys: by bisection, which for few values and many keys beats `np.isin`."""
    if not len(keys):
        return np.zeros(len(values), bool)
    return keys[np.minimum(np.searchsorted(keys, values), len(keys) - 1)] == values


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """|a and b| / |a or b| of two sorted sets; 0 where one is empty."""
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / max(1, len(a) + len(b) - shared)


def exact_key(text: str) -> bytes:
    """16 bytes, equal for texts whose words are equal; a text without words equals only itself."""
    words = normalised_words(text)
    same = "\0" + " ".join(words) if words else text
    return hashlib.blake2b(same.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def band_keys(documents: Sequence[np.ndarray], spec: DedupSpec) -> np.ndarray:
    """(documents, bands) uint64: documents that agree in a band are candidates (MinHash, Broder 1997; banding, Indyk
    and Motwani 1998). A document without shingles gets keys of its own in every band: 0, which the search skips.
    """
    from rensa import RMinHash  # pyright: ignore[reportAttributeAccessIssue]  # its module is compiled

    if not documents:
        return np.empty((0, spec.bands), np.uint64)
    offsets = np.cumsum([0, *map(len, documents)]).astype(np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(
        np.concatenate(documents), offsets, spec.bands * spec.rows, SEED
    )
    signature = np.array(matrix.to_rows(), np.uint64).reshape(len(documents), spec.bands, spec.rows)
    keys = np.zeros(signature.shape[:2], np.uint64)
    for row in range(spec.rows):
        keys = (keys ^ signature[:, :, row]) * np.uint64(0x9E3779B97F4A7C15)
        keys ^= keys >> np.uint64(29)
    keys[keys == 0] = 1
    keys[[len(d) == 0 for d in documents]] = 0
    return keys


def line_keys(parts: Sequence[str], least: int) -> np.ndarray:
    """(parts,) uint64 hashes of lines or paragraphs, 0 for those shorter than `least` characters."""
    stripped = [part.strip() for part in parts]
    return np.array([hash_text(part) | 1 if len(part) >= least else 0 for part in stripped], np.uint64)


SEPARATORS = {"line": "\n", "paragraph": "\n\n"}


def drop_parts(document: Document, note: Note, unit: str, least: int, listed: np.ndarray | None) -> Document | Dropped:
    """Removes lines or paragraphs: those whose key is in `listed` (sorted), or repeats in the document when it is None.

    Parts shorter than `least` characters stay. A document of which nothing is left is dropped.
    """
    separator = SEPARATORS[unit]
    parts = document.text.split(separator)
    keys = line_keys(parts, least)
    if listed is None:
        first = np.zeros(len(keys), bool)
        first[np.unique(keys, return_index=True)[1]] = True
        gone = (keys != 0) & ~first
        reason, reasons = f"repeated {unit}", f"repeated {unit}s"
    else:
        gone = (keys != 0) & among(keys, listed)
        reason, reasons = f"{unit} of many documents", f"{unit}s of many documents"
    if not gone.any():
        return document
    note(reason, example=parts[int(np.argmax(gone))].strip(), count=int(gone.sum()))
    text = separator.join(part for part, drop in zip(parts, gone) if not drop).strip()
    if not text:
        return Dropped(f"nothing but {reasons}")
    return Document(document.id, text + "\n", document.meta)


class Contamination:
    """The n-grams of evaluation texts, and the stage that drops training documents which share one."""

    def __init__(self, keys: np.ndarray, owners: np.ndarray, ids: list[str], n: int):
        self.keys, self.owners, self.ids, self.n = keys, owners, ids, n

    @classmethod
    def of(cls, documents: Sequence[Document], n: int) -> "Contamination":
        """From evaluation documents; texts of fewer than n words have no n-gram and are not looked for."""
        found, owners = [], []
        for number, document in enumerate(documents):
            grams = np.unique(ngrams(hash_words(normalised_words(document.text)), n))
            found.append(grams)
            owners.append(np.full(len(grams), number, np.int64))
        keys, first = np.unique(np.concatenate(found) if found else np.empty(0, np.uint64), return_index=True)
        owner = np.concatenate(owners)[first] if owners else np.empty(0, np.int64)
        return cls(keys, owner, [d.id for d in documents], n)

    def stage(self, document: Document, note: Note) -> Document | Dropped:
        """Drops a document that shares an n-gram with an evaluation text, and names that text."""
        grams = ngrams(hash_words(normalised_words(document.text)), self.n)
        hits = np.flatnonzero(among(grams, self.keys))
        if not len(hits):
            return document
        owner = self.ids[self.owners[np.searchsorted(self.keys, grams[hits[0]])]]
        return Dropped("contamination", f"shares {len(hits)} {self.n}-grams with evaluation text {owner!r}")


def document_stages(spec: DedupSpec) -> list[tuple[str, Stage]]:
    """The stages that look for repeats inside a document."""
    found = []
    for unit, wanted in (("paragraph", spec.document_paragraphs), ("line", spec.document_lines)):
        if wanted:
            stage = functools.partial(drop_parts, unit=unit, least=spec.line_characters, listed=None)
            found.append((f"repeated {unit}s", stage))
    return found
