"""Conversations as tokens: what the assistant says is learned, and rows hold whole conversations.

A conversation of n ids has n - 1 places: its inputs are all ids but the last, its targets all but the first. Nothing
opens it but what its template writes, as in generation. It ends with the last answer. One of more places than a row
loses its last turns, up to the last answer that fits; where not even the first one fits, it is dropped. A pair of
answers that does not fit is dropped: without its beginning, a prompt would be another one.
"""

import numpy as np

from llm.data import messages
from llm.data.documents import Document, Dropped, Note
from llm.data.pack import Plan
from llm.data.shards import Shards
from llm.errors import InputError
from llm.tokenization import Tokenizer

ENCODED = "\0encoded"  # the key of a document's meta that `encode` adds: ids by `messages.FIELDS`


def encode(
    document: Document, note: Note, tokenizer: Tokenizer, form: str, row_length: int, on_error: str
) -> Document | Dropped:
    """The document with its ids.

    Raises:
        InputError: the template refuses it, and `on_error` is "stop"; else such a document is dropped.
    """
    try:
        made = (_chat if form == messages.CHAT else _preference)(document, note, tokenizer, row_length)
    except InputError as error:
        if on_error == "stop":
            raise InputError(f"{document.meta.get('source', document.id)}: {error}") from None
        return Dropped("refused", str(error))
    return made if isinstance(made, Dropped) else Document(document.id, document.text, document.meta | {ENCODED: made})


def _chat(document: Document, note: Note, tokenizer: Tokenizer, row_length: int) -> list[list[int]] | Dropped:
    ids, learned = tokenizer.chat_answers(document.meta["messages"])
    if len(ids) - 1 > row_length:
        last = [n for n in range(1, row_length + 1) if learned[n] and not learned[n + 1]]
        if not last:
            return Dropped("longer than a row", f"{len(ids) - 1} tokens before its last one, a row has {row_length}")
        note("cut to the answers that fit a row", f"{len(ids)} tokens -> {last[-1] + 1}")
        ids, learned = ids[: last[-1] + 1], learned[: last[-1] + 1]
    return [ids, list(map(int, learned))]


def _preference(document: Document, note: Note, tokenizer: Tokenizer, row_length: int) -> list[list[int]] | Dropped:
    prompt = document.meta["prompt"]
    opened = tokenizer.chat(prompt)
    found = [opened]
    for key in ("chosen", "rejected"):
        ids, _ = tokenizer.chat_answers([*prompt, {"role": "assistant", "content": document.meta[key]}])
        found.append(ids[len(opened) :])
    if found[1] == found[2]:
        return Dropped("both answers are one text")
    places = sum(map(len, found)) + len(opened) - 2
    if places > row_length:
        return Dropped("longer than a row", f"both answers take {places} places, a row has {row_length}")
    return found


def token_lengths(lengths_DF: np.ndarray, fields: tuple[str, ...]) -> np.ndarray:
    """Of (documents, fields) lengths, those of fields that are ids of text."""
    return lengths_DF[:, :1] if fields == messages.FIELDS[messages.CHAT] else lengths_DF


def rows(plan: Plan, shards: Shards, indices: np.ndarray, fill: int) -> dict[str, np.ndarray]:
    """The rows at `indices`, by the keys of `llm.data.objectives`: weight 1 where the assistant's token is predicted.

    Args:
        plan: of conversations by their places, each piece a whole one.
        shards: of ids and what is learned.
        fill: stands at padding.
    """
    shape = (len(indices), plan.row_length)
    tokens, targets = np.full(shape, fill, np.int32), np.zeros(shape, np.int32)
    weights, segments, positions = np.zeros(shape, np.float32), np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for row, index in enumerate(indices):
        at = 0
        for number, piece in enumerate(range(plan.splits[index], plan.splits[index + 1]), 1):
            document, length = int(plan.document[piece]), int(plan.length[piece])
            ids, learned = shards.sequence(document, 0), shards.sequence(document, 1)
            place = slice(at, at + length)
            tokens[row, place], targets[row, place], weights[row, place] = ids[:-1], ids[1:], learned[1:]
            segments[row, place], positions[row, place] = number, np.arange(length)
            at += length
    return {"tokens": tokens, "targets": targets, "weights": weights, "segments": segments, "positions": positions}


def answers(shards: Shards, document: int) -> list[tuple[list[int], list[int]]]:
    """(what stands before, the answer without what ends it) for every answer of a conversation, as ids."""
    ids, learned = shards.sequence(document, 0).tolist(), shards.sequence(document, 1)
    edges = np.flatnonzero(np.diff(learned, prepend=0, append=0)).reshape(-1, 2)
    return [(ids[:start], ids[start : end - 1]) for start, end in edges.tolist()]
