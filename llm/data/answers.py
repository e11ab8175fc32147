"""Questions answered by a span of a text: finding it in cleaned text, and windows over texts longer than a row."""

from collections.abc import Iterator, Sequence

from llm.data.documents import Document, Dropped, Note

LABELS = ("start", "end", "window")  # of an example: the answer's tokens, and which window over the text it is
MARGIN = 4  # special tokens around question and context, at most


def locate(document: Document, note: Note, key: str) -> Document | Dropped:
    """Moves the answer's start to where the answer stands in the text as it is now.

    Cleaning moves characters, so the occurrence nearest to where it was said to be is taken.
    """
    answer = document.meta[key]
    if answer is None:
        return document
    if (
        not isinstance(answer, dict)
        or not isinstance(answer.get("text"), str)
        or not isinstance(answer.get("start"), int)
    ):
        return Dropped("answer is no span", f"{key}={answer!r}, expected null or {{'text': ..., 'start': ...}}")
    wanted, said = answer["text"], answer["start"]
    found, at = [], document.text.find(wanted) if wanted else -1
    while at >= 0:
        found.append(at)
        at = document.text.find(wanted, at + 1)
    if not found:
        return Dropped("answer is not in the text", wanted)
    start = min(found, key=lambda place: (abs(place - said), place))
    if start != said:
        note("answer moved", example=f"{wanted!r}: {said} -> {start}")
    return Document(document.id, document.text, {**document.meta, key: {"text": wanted, "start": start}})


def windows(
    context: Sequence[int],
    spans: Sequence[tuple[int, int]],
    answer: dict | None,
    question_length: int,
    row_length: int,
) -> Iterator[tuple[Sequence[int], list[int]]]:
    """(tokens, [first, last]) of overlapping windows of a context, half a window apart.

    Args:
        context: the ids of the whole context.
        spans: the characters of each id, (start, end).
        answer: {"text", "start"} in characters, or None.
        question_length: tokens of the question.
        row_length: what question and window must fit into.

    Yields:
        the ids of a window and the answer's first and last token in it; (-1, -1) where it holds no whole answer.
    """
    first, last = -1, -1
    if answer is not None:
        start, end = answer["start"], answer["start"] + len(answer["text"])
        inside = [k for k, (a, b) in enumerate(spans) if a < end and b > start]
        if inside:
            first, last = inside[0], inside[-1]
    room = max(row_length - question_length, row_length // 2) - MARGIN
    room = max(room, 1)
    at = 0
    while True:
        window = context[at : at + room]
        holds = first >= at and last < at + len(window)
        yield window, [first - at, last - at] if holds else [-1, -1]
        if at + room >= len(context):
            return
        at += max(1, room // 2)
