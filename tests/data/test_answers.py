"""Answers as spans: found again after cleaning, and counted in windows."""

from llm.data.answers import MARGIN, locate, windows
from llm.data.documents import Document, Dropped


def located(text, answer):
    notes = []
    found = locate(Document("q", text, {"a": answer}), lambda reason, example="": notes.append(reason), "a")
    return (found.reason if isinstance(found, Dropped) else found.meta["a"]), notes


def test_the_occurrence_nearest_to_where_it_was_is_taken():
    text = "ab ... ab ... ab"
    for said, start in ((0, 0), (1, 0), (6, 7), (9, 7), (13, 14), (99, 14)):
        assert located(text, {"text": "ab", "start": said})[0] == {"text": "ab", "start": start}
    assert located(text, {"text": "ab", "start": 7})[1] == [] and located(text, {"text": "ab", "start": 8})[1]
    assert located(text, None) == (None, [])
    assert located(text, {"text": "xy", "start": 0})[0] == "answer is not in the text"
    assert located(text, {"text": "", "start": 0})[0] == "answer is not in the text"
    for wrong in ("ab", {"text": "ab"}, {"text": "ab", "start": "0"}, 3):
        assert located(text, wrong)[0] == "answer is no span"


def test_windows_cover_the_context_and_hold_whole_answers():
    context = list(range(100, 150))
    spans = [(2 * k, 2 * k + 2) for k in range(50)]  # two characters a token
    answer = {"text": "xxxx", "start": 41}  # characters 41 to 45: tokens 20 to 22
    row_length, question = 24, 8
    found = list(windows(context, spans, answer, question, row_length))
    room = row_length - question - MARGIN
    assert all(len(window) <= room for window, _ in found)
    assert {t for window, _ in found for t in window} == set(context)
    for window, (first, last) in found:
        whole = window[0] <= 120 and window[-1] >= 122
        assert (first, last) == ((120 - window[0], 122 - window[0]) if whole else (-1, -1))
    assert sum(span[0] >= 0 for _, span in found) == 2  # windows overlap by half
    assert [span for _, span in windows(context, spans, None, question, row_length)] == [[-1, -1]] * len(found)
    assert list(windows(context[:5], spans[:5], {"text": "x", "start": 0}, 1, row_length)) == [(context[:5], [0, 0])]
