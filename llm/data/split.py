"""Which documents, or which parts of them, are held out."""

import dataclasses

from llm.data.sources import Document
from llm.data.spec import DataSpec
from llm.errors import InputError


def split(spec: DataSpec, documents: list[Document]) -> tuple[list[Document], list[Document]]:
    """(training documents, validation documents), by `holdout` or `split_by`.

    A split by hash depends on each document's text alone: it is stable when documents are added, and equal texts fall
    on the same side.

    Raises:
        InputError: an id of `holdout` that does not exist, or a side that would be empty.
    """
    if spec.holdout:
        ids = {d.id for d in documents}
        missing = [name for name in spec.holdout if name not in ids]
        if missing:
            shown = ", ".join(sorted(ids)[:8]) + (", ..." if len(ids) > 8 else "")
            raise InputError(f"data.holdout names {missing[0]!r}, which {spec.train} does not have; it has {shown}")
        train = [d for d in documents if d.id not in spec.holdout]
        validation = [d for d in documents if d.id in spec.holdout]
    elif spec.split_by == "tail":
        parts = [_cut(d, spec.validation_fraction) for d in documents]
        train = [head for head, _ in parts if head.text.strip()]
        validation = [tail for _, tail in parts if tail.text.strip()]
    else:
        threshold = int(spec.validation_fraction * 2**32)
        train, validation = [], []
        for document in documents:
            (validation if int(document.hash[:8], 16) < threshold else train).append(document)
    if not train or not validation:
        side = "validation" if train else "training"
        tail = "" if spec.split_by == "tail" else ", or data.split_by=tail to hold out the end of every document"
        raise InputError(
            f"{spec.train}: nothing of its {len(documents)} documents falls on the {side} side; add text, or set "
            f"data.validation to another source{tail}"
        )
    return train, validation


def check_disjoint(train: list[Document], validation: list[Document]) -> None:
    """Raises InputError when the text of a validation document also stands in training."""
    seen = {d.hash: d for d in train}
    for document in validation:
        twin = seen.get(document.hash)
        if twin is not None:
            raise InputError(
                f"the validation document {document.id!r} ({document.meta.get('source')}) has the same text as the "
                f"training document {twin.id!r} ({twin.meta.get('source')}); remove one of them"
            )


def _cut(document: Document, fraction: float) -> tuple[Document, Document]:
    """A document's head and tail, cut after the last line end before the wanted share, else after the last space."""
    text = document.text
    share = round(len(text) * (1 - fraction))
    at = text.rfind("\n", 0, share) + 1 or text.rfind(" ", 0, share) + 1 or share
    head = dataclasses.replace(document, text=text[:at])
    return head, dataclasses.replace(document, id=f"{document.id}#tail", text=text[at:])
