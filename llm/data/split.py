"""Which documents, or which parts of them, are held out."""

import dataclasses
from collections.abc import Iterator

from llm.data.dedup import exact_key
from llm.data.documents import Document
from llm.data.spec import DataSpec

TRAIN, VALIDATION = "train", "validation"
SPLITS = (TRAIN, VALIDATION)


def held_out(spec: DataSpec, document: Document, evaluation: bool) -> bool:
    """Whether a whole document is held out.

    By hash it depends on the words of the document alone: the split is stable when documents are added, and texts that
    differ in case, punctuation or blank space fall on the same side.

    Args:
        spec: says how.
        document: a cleaned document.
        evaluation: whether it comes from the source of `data.validation`.
    """
    if spec.validation:
        return evaluation
    if spec.holdout:
        return document.id in spec.holdout
    if spec.split_by == "tail":
        return False
    return int.from_bytes(exact_key(document.text)[:4], "big") < int(spec.validation_fraction * 2**32)


def sides(spec: DataSpec, document: Document, held: bool) -> Iterator[tuple[str, Document]]:
    """The document under its split, or by `split_by="tail"` its head and its tail."""
    if spec.split_by != "tail" or spec.validation or spec.holdout:
        yield (VALIDATION if held else TRAIN), document
        return
    head, tail = cut(document, spec.validation_fraction)
    if not tail.text.strip():
        yield TRAIN, document
    elif not head.text.strip():
        yield VALIDATION, document
    else:
        yield TRAIN, head
        yield VALIDATION, tail


def cut(document: Document, fraction: float) -> tuple[Document, Document]:
    """A document's head and tail, cut after the last line end before the wanted share, else after the last space."""
    text = document.text
    share = round(len(text) * (1 - fraction))
    at = text.rfind("\n", 0, share) + 1 or text.rfind(" ", 0, share) + 1 or share
    head = dataclasses.replace(document, text=text[:at])
    return head, dataclasses.replace(document, id=f"{document.id}#tail", text=text[at:])
