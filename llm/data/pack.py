"""Packing: token streams of documents into rows of one length, no token lost or doubled."""

from collections.abc import Sequence

import numpy as np


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned dtype that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def pack(documents: Sequence[Sequence[int]], row_length: int, end_of_text: int, dtype) -> dict[str, np.ndarray]:
    """Concatenates documents and splits the stream into rows.

    A document of n tokens has n + 1 inputs, the end of text and its tokens, and n + 1 targets, its tokens and the end
    of text. So every token is predicted once, the first from the end of text alone, and no target crosses a border.
    Inputs and targets lie side by side: a row's last input keeps its target.

    Returns:
        tokens, targets: (rows, row_length) of `dtype`.
        segments: (rows, row_length) int32, 1, 2, ... for the documents of a row, 0 for the padding of the last row.
    """
    total = sum(len(d) + 1 for d in documents)
    rows = -(-total // row_length)
    tokens = np.full(rows * row_length, end_of_text, dtype)
    targets = np.full(rows * row_length, end_of_text, dtype)
    document_of = np.zeros(rows * row_length, np.int64)
    at = 0
    for number, ids in enumerate(documents, 1):
        n = len(ids)
        tokens[at + 1 : at + n + 1] = ids
        targets[at : at + n] = ids
        document_of[at : at + n + 1] = number
        at += n + 1
    document_of = document_of.reshape(rows, row_length)
    segments = np.where(document_of == 0, 0, document_of - document_of[:, :1] + 1).astype(np.int32)
    return {
        "tokens": tokens.reshape(rows, row_length),
        "targets": targets.reshape(rows, row_length),
        "segments": segments,
    }
