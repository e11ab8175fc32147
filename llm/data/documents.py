"""Documents, and the accounts that every stage keeps of them."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator

EXAMPLES = 10


@dataclasses.dataclass(frozen=True)
class Document:
    """A text, an id that is unique in its source, and what is known of it.

    Attributes:
        id: from where it came, never from the order in which files were read.
        text: the text, or the first of several fields (`data.fields`), the others standing in `meta`.
        meta: JSON values. `meta["source"]` says where the document came from, "path" or "path:line".
    """

    id: str
    text: str
    meta: dict = dataclasses.field(default_factory=dict)

    @property
    def hash(self) -> str:
        """A hash of the text alone."""
        return hashlib.sha256(self.text.encode("utf-8", "surrogatepass")).hexdigest()


@dataclasses.dataclass(frozen=True)
class Dropped:
    """What a stage returns in place of a document that it takes out: the reason, and what it saw."""

    reason: str
    detail: str = ""


# note(reason, example, count): a stage says what it changed in the document at hand.
Note = Callable[..., None]
Stage = Callable[[Document, Note], Document | Dropped]


@dataclasses.dataclass
class Tally:
    """The account of one stage. Documents in = documents out + those dropped, reason by reason.

    Attributes:
        dropped: reason -> [documents, characters, examples]; an example is {"id", "detail"}.
        changed: reason -> [occurrences, documents, examples].
    """

    stage: str
    documents_in: int = 0
    characters_in: int = 0
    documents_out: int = 0
    characters_out: int = 0
    dropped: dict[str, list] = dataclasses.field(default_factory=dict)
    changed: dict[str, list] = dataclasses.field(default_factory=dict)

    def note(self, document: Document, reason: str, example: str = "", count: int = 1) -> None:
        """Counts a change of a document: `count` occurrences of `reason`, one of which reads `example`."""
        entry = self.changed.setdefault(reason, [0, 0, []])
        entry[0] += count
        entry[1] += 1
        if len(entry[2]) < EXAMPLES:
            entry[2].append({"id": document.id, "detail": _short(example)})

    def count(self, before: Document, after: Document | Dropped) -> None:
        """Counts what became of a document."""
        self.documents_in += 1
        self.characters_in += len(before.text)
        if isinstance(after, Document):
            self.documents_out += 1
            self.characters_out += len(after.text)
            return
        entry = self.dropped.setdefault(after.reason, [0, 0, []])
        entry[0] += 1
        entry[1] += len(before.text)
        if len(entry[2]) < EXAMPLES:
            entry[2].append({"id": before.id, "detail": _short(after.detail)})

    def add(self, other: "Tally") -> None:
        """Adds another part's account of the same stage; the first ten examples stay."""
        for name in ("documents_in", "characters_in", "documents_out", "characters_out"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for mine, theirs in ((self.dropped, other.dropped), (self.changed, other.changed)):
            for reason, (first, second, examples) in theirs.items():
                entry = mine.setdefault(reason, [0, 0, []])
                entry[0] += first
                entry[1] += second
                entry[2] = (entry[2] + examples)[:EXAMPLES]


def apply(
    stage: Stage,
    documents: Iterable[Document],
    tally: Tally,
    removed: Callable[[Document, Dropped, str], None] = lambda *_: None,
) -> Iterator[Document]:
    """The documents that a stage lets through; `removed(document, dropped, stage's name)` hears of the others."""
    for document in documents:
        result = stage(document, functools.partial(tally.note, document))
        tally.count(document, result)
        if isinstance(result, Document):
            yield result
        else:
            removed(document, result, tally.stage)


def _short(text: str, limit: int = 160) -> str:
    text = text if len(text) <= limit else text[: limit - 1] + "…"
    return text.encode("utf-8", "backslashreplace").decode()
