"""SQuAD's scores worked by hand, and the best span against all spans."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from llm.errors import InputError
from llm.evaluation.spans import (
    Span,
    answer_f1,
    answer_scores,
    answer_tokens,
    best_span,
    exact_match,
    normalize_answer,
)

TEXTS = st.lists(st.sampled_from(["the", "Cat", "cat.", "sat", "an", "-", "上海"]), max_size=6).map(" ".join)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("The U.S.  Army", "us army"),
        ("  an Apple,\ta day\n", "apple day"),
        ("THE", ""),
        ("a-b", "ab"),
        ("A (1912) theory", "1912 theory"),
        ("another theme", "another theme"),
        ("thea. the", "thea"),
        ("north–the–south", "north– –south"),
        ("$5.00!", "500"),
        ("1914–18", "1914–18"),
        ("Ærøskøbing's", "ærøskøbings"),
        ("北京。", "北京"),
        ("《红楼梦》，曹雪芹", "红楼梦曹雪芹"),
        ("人々", "人々"),
    ],
)
def test_normalization(text, expected):
    assert normalize_answer(text) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("the iPhone手机 now", ["iphone", "手", "机", "now"]),
        ("東京タワー", ["東", "京", "タ", "ワ", "ー"]),
        ("人々々", ["人", "々", "々"]),
        ("ไทย", ["ไ", "ท", "ย"]),
        ("ខ្មែ", ["ខ", "្", "ម", "ែ"]),
        ("မြန်", ["မ", "ြ", "န", "်"]),
        ("\U00020bb7\U00020bb7家", ["\U00020bb7", "\U00020bb7", "家"]),
        ("㐀㐁", ["㐀", "㐁"]),
        ("\uf900\uf901", ["\uf900", "\uf901"]),
        ("ㇰㇱ", ["ㇰ", "ㇱ"]),
        ("ｱｲ", ["ｱ", "ｲ"]),
        ("서울 타워", ["서울", "타워"]),
        ("Москва город", ["москва", "город"]),
        ("1999年", ["1999", "年"]),
    ],
)
def test_scripts_without_spaces_count_by_character(text, expected):
    assert answer_tokens(text) == expected


@pytest.mark.parametrize(
    "prediction, references, exact, f1",
    [
        ("The Eiffel Tower", ["eiffel tower."], 1, 1),
        ("in Paris, France", ["Paris"], 0, 2 * (1 / 3) * 1 / (1 / 3 + 1)),
        ("new new york", ["New York"], 0, 2 * (2 / 3) * 1 / (2 / 3 + 1)),
        ("york new", ["New York"], 0, 1),
        ("London", ["Paris"], 0, 0),
        # The best of several.
        ("December 1903", ["17 December 1903", "1903", "December, 1903"], 1, 1),
        ("1903 in winter", ["17 December 1903", "1903"], 0, 0.5),
        # No answer.
        ("", [], 1, 1),
        ("", [""], 1, 1),
        ("the.", [], 1, 1),
        ("Paris", [], 0, 0),
        ("Paris", ["", "the"], 0, 0),
        ("", ["Paris"], 0, 0),
        ("", ["", "Paris"], 0, 0),
        ("", ["the", "Paris"], 0, 0),
        ("Paris", ["", "Paris"], 1, 1),
        # By character: 2 of 3 and 2 of 2.
        ("上海市", ["上海"], 0, 0.8),
        ("上海", ["上海。"], 1, 1),
        ("海上", ["上海"], 0, 1),
    ],
)
def test_answers(prediction, references, exact, f1):
    assert exact_match(prediction, references) == exact
    assert answer_f1(prediction, references) == pytest.approx(f1)


@given(TEXTS, TEXTS)
def test_f1_against_crossing_out(prediction, reference):
    left, hits = answer_tokens(reference), 0
    total = len(left)
    for token in answer_tokens(prediction):
        if token in left:
            left.remove(token)
            hits += 1
    guessed = len(answer_tokens(prediction))
    precision, recall = hits / max(guessed, 1), hits / max(total, 1)
    expected = 2 * precision * recall / (precision + recall) if hits else float(guessed == total == 0)
    assert answer_f1(prediction, [reference]) == pytest.approx(expected)
    assert answer_f1(reference, [prediction]) == answer_f1(prediction, [reference])
    assert answer_f1(prediction, [prediction]) == exact_match(prediction, [prediction]) == 1.0
    assert answer_f1(prediction, [reference]) >= exact_match(prediction, [reference])


def test_means():
    scores = answer_scores(["Paris", "in Paris, France", "", "Rome"], [["Paris"], ["Paris"], [], ["Oslo", "Bergen"]])
    assert scores.examples == 4
    assert scores.exact_match_each == (1, 0, 1, 0) and scores.f1_each == (1, 0.5, 1, 0)
    assert (scores.exact_match, scores.f1) == (0.5, 0.625)
    many = answer_scores(["x"] * 400, [["x"]] * 300 + [["y"]] * 100, resamples=5000)
    expected = binom.ppf([0.025, 0.975], 400, 0.75) / 400
    np.testing.assert_allclose(many.exact_match_interval, expected, atol=1.01 / 400)
    np.testing.assert_allclose(many.f1_interval, expected, atol=1.01 / 400)
    # One resample each, so that both ends are its score.
    once, other = (answer_scores(["x"] * 99, [["x"], ["y"], ["z"]] * 33, resamples=1, seed=seed) for seed in (0, 1))
    for name in ("exact_match_interval", "f1_interval"):
        (low, high), others = getattr(once, name), getattr(other, name)
        assert low == high and others[0] != low
    # The two intervals are each its own score's.
    half = answer_scores(["x z"] * 50, [["x"]] * 50)
    assert half.exact_match_interval == (0.0, 0.0) and half.f1_interval == pytest.approx((2 / 3, 2 / 3))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(TEXTS, st.lists(TEXTS, max_size=2)), min_size=1, max_size=8), st.randoms())
def test_the_order_of_the_examples_does_not_matter(examples, random):
    def means(examples):
        scores = dataclasses.asdict(answer_scores([p for p, _ in examples], [r for _, r in examples], resamples=20))
        return {name: value for name, value in scores.items() if not name.endswith("each")}

    # Shares of several sizes, whose sum rounds differently in different orders.
    examples = examples + [("cat " * count, ["cat"]) for count in range(1, 12)]
    shuffled = list(examples)
    random.shuffle(shuffled)
    assert means(shuffled) == means(examples)


@pytest.mark.parametrize(
    "predictions, references, error, message",
    [
        ([], [], InputError, "no answers"),
        (["a"], [["a"], ["b"]], ValueError, "1 predictions for 2 lists"),
        (["a", "b"], [["a"], "bcd"], ValueError, "references of example 1: 'bcd'"),
    ],
)
def test_refuses_answers(predictions, references, error, message):
    with pytest.raises(error, match=message):
        answer_scores(predictions, references)


def all_spans(start_S, end_S, offset, length, max_length):
    """The best of every allowed pair, the first of equal ones."""
    best, found = start_S[0] + end_S[0], None
    for start in range(offset, offset + length):
        for end in range(start, min(start + max_length, offset + length)):
            if start_S[start] + end_S[end] > best:
                best, found = start_S[start] + end_S[end], (start, end)
    return found, best - (start_S[0] + end_S[0])


@st.composite
def rows(draw):
    width = draw(st.integers(2, 9))
    logits = st.lists(st.integers(-3, 3).map(float), min_size=width, max_size=width)
    contexts = st.integers(1, width).flatmap(lambda o: st.tuples(st.just(o), st.integers(0, width - o)))
    drawn = draw(st.lists(st.tuples(logits, logits, contexts), min_size=1, max_size=4))
    return [np.array(part) for part in zip(*drawn)], draw(st.integers(1, 10))


@settings(deadline=None, max_examples=120)
@given(rows())
def test_best_span_against_all_spans(drawn):
    (starts, ends, contexts), max_length = drawn
    found = best_span(starts, ends, contexts[:, 0], contexts[:, 1], max_length)
    assert len(found) == len(starts)
    for span, start_S, end_S, (offset, length) in zip(found, starts, ends, contexts):
        expected, score = all_spans(start_S, end_S, offset, length, max_length)
        assert (None if span is None else (span.start, span.end)) == expected
        assert span is None or span.score == score


def one(start, end, offset=1, length=None, max_length=10):
    length = len(start) - offset if length is None else length
    return best_span(np.array([start]), np.array([end]), [offset], [length], max_length)[0]


def test_best_span_worked_by_hand():
    start, end = [0.0, 1.0, 5.0, 2.0, 9.0], [0.0, 8.0, 1.0, 4.0, -3.0]
    # 9 + 8 and 5 + 8 would end before they start; of 1 + 8 and 5 + 4 the first is taken.
    assert one(start, end) == Span(1, 1, 9.0)
    assert one(start, end, offset=2) == Span(2, 3, 9.0)
    # 5 + 1, 2 + 4 and 9 - 3.
    assert one(start, end, offset=2, max_length=1) == Span(2, 2, 6.0)
    # A higher end lies behind the context.
    assert one([0.0, 3.0, 0.0], [0.0, 1.0, 9.0], length=1) == Span(1, 1, 4.0)
    assert one([0.0, 3.0, 0.0], [0.0, 1.0, 9.0], max_length=10**12) == Span(1, 2, 12.0)


def test_no_answer_wins_ties():
    assert one([1.0, 2.0], [2.0, 1.0]) is None
    assert one([1.0, 2.0], [2.0, 1.5]) == Span(1, 1, 0.5)
    assert one([1.0, 9.0], [2.0, 9.0], length=0) is None
    # An answer is forced.
    assert one([-np.inf, -4.0], [2.0, -4.0]) == Span(1, 1, np.inf)
    assert one([0.0, -np.inf], [0.0, 5.0]) is None


def test_half_precision_logits_are_added_in_full():
    # In bfloat16 256 + 1 is 256, and the first would win.
    start = np.array([[0, 256, 256]], ml_dtypes.bfloat16)
    end = np.array([[0, 0, 1]], ml_dtypes.bfloat16)
    assert best_span(start, end, [1], [2], 1) == [Span(2, 2, 257.0)]
    # The same of no answer: 256 + 1 beats 258 - 1.5.
    start, end = np.array([[256, 258]], ml_dtypes.bfloat16), np.array([[1, -1.5]], ml_dtypes.bfloat16)
    assert best_span(start, end, [1], [1], 1) == [None]


def test_a_long_context_does_not_take_all_pairs():
    # All pairs would be 80 GB.
    start, end = np.zeros((1, 100_001)), np.zeros((1, 100_001))
    start[0, 70_000], end[0, 70_004], end[0, 99_999] = 1.0, 1.0, 5.0
    assert best_span(start, end, [1], [80_000], 30) == [Span(70_000, 70_004, 2.0)]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"starts": np.zeros((2, 5))}, r"start logits \(2, 5\)"),
        ({"starts": np.zeros(4), "ends": np.zeros(4)}, "expected the same"),
        ({"offsets": [1]}, "2 rows have offsets"),
        ({"lengths": [1, 1, 1]}, "context lengths"),
        ({"offsets": [0, 1]}, "outside places 1 to 3"),
        ({"lengths": [3, 4]}, "outside places"),
        ({"lengths": [3, -1]}, "outside places"),
        ({"max_length": 0}, "max_length=0"),
        ({"ends": np.full((2, 4), np.nan)}, "NaN"),
        ({"starts": np.full((2, 4), np.inf)}, "infinity"),
    ],
)
def test_best_span_refuses(change, message):
    given_ = {"starts": np.zeros((2, 4)), "ends": np.zeros((2, 4)), "offsets": [1, 1], "lengths": [3, 3]}
    given_ = {**given_, "max_length": 2, **change}
    with pytest.raises(ValueError, match=message):
        best_span(*given_.values())
