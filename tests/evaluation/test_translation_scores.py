"""BLEU and chrF against their formulas, worked by hand and by counting."""

import dataclasses
import json
import math
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.errors import InputError
from llm.evaluation.translation import translation_scores
from tests.helpers import ROOT

# Words without punctuation, which every tokenizer splits at the spaces.
SENTENCES = st.lists(st.sampled_from(["ein", "Hund", "bellt", "laut"]), max_size=9).map(" ".join)
PAIRS = st.lists(st.tuples(SENTENCES, SENTENCES), min_size=1, max_size=5)
MIXED = [
    ("Der Hund bellt laut in der Nacht.", "Der Hund bellt in der Nacht sehr laut."),
    ("Es regnet heute.", "Heute regnet es stark."),
    ("Wir gehen morgen ins Kino.", "Wir gehen morgen ins Kino."),
    ("Das Haus ist alt und klein.", "Das alte Haus ist klein."),
    ("Nein.", "Ja, natürlich."),
]


def scores_of(pairs, **options):
    options = {"resamples": 20, **options}
    return translation_scores([h for h, _ in pairs], [r for _, r in pairs], **options)


def grams(items, order):
    return Counter(tuple(items[i : i + order]) for i in range(len(items) - order + 1))


def bleu(pairs, orders=4):
    """Papineni et al. 2002; an order without a match counts as 1/2, 1/4 ... of one, as NIST's script has it."""
    pairs = [(h.split(), r.split()) for h, r in pairs]
    guessed, wanted = sum(len(h) for h, _ in pairs), sum(len(r) for _, r in pairs)
    logs, halves = [], 1.0
    for order in range(1, orders + 1):
        total = sum(grams(h, order).total() for h, _ in pairs)
        match = sum((grams(h, order) & grams(r, order)).total() for h, r in pairs)
        if not total or (order == 1 and not match):
            return 0.0
        halves = halves if match else halves / 2
        logs.append(math.log((match or halves) / total))
    return 100 * min(1.0, math.exp(1 - wanted / guessed)) * math.exp(sum(logs) / orders)


def chrf(pairs, orders=6, beta=2):
    """Popović 2015 over the characters but spaces; orders that either side is too short for are left out."""
    pairs = [(h.replace(" ", ""), r.replace(" ", "")) for h, r in pairs]
    rates = []
    for order in range(1, orders + 1):
        # As sacrebleu has it, an example whose reference has no n-gram of this order does not count.
        counts = [(grams(h, order), grams(r, order)) for h, r in pairs if len(r) >= order]
        match = sum((h & r).total() for h, r in counts)
        guessed, wanted = sum(h.total() for h, _ in counts), sum(r.total() for _, r in counts)
        if guessed and wanted:
            rates.append((match / guessed, match / wanted))
    precision, recall = np.mean(rates, axis=0) if rates else (0.0, 0.0)
    if not precision + recall:
        return 0.0
    return 100 * (1 + beta**2) * precision * recall / (beta**2 * precision + recall)


def test_two_right_words_have_no_4_gram():
    scores = scores_of([("hello world", "hello world")])
    assert scores.bleu == 0.0 and scores.bleu_interval == (0.0, 0.0)
    assert scores.sentence_bleu == pytest.approx((100.0,))
    assert scores.chrf == pytest.approx(100.0)


@pytest.mark.parametrize(
    "tokenize, expected",
    [
        # Matches 6/6, 4/5, 2/4, 1/3 and 6 words for 7. With the dot left at its word 5/5, 3/4, 1/3, none of 2 (which
        # counts as half of one), and 5 words for 6.
        ("13a", 100 * math.exp(1 - 7 / 6) * (4 / 5 * 2 / 4 * 1 / 3) ** 0.25),
        ("none", 100 * math.exp(1 - 6 / 5) * (3 / 4 * 1 / 3 * 1 / 4) ** 0.25),
    ],
)
def test_the_dog(tokenize, expected):
    scores = scores_of([("The dog bit the man.", "The dog had bit the man.")], language="en", tokenize=tokenize)
    assert scores.bleu == pytest.approx(expected)
    assert round(scores.bleu, 2) == {"13a": 51.15, "none": 40.94}[tokenize]
    assert scores.sentence_bleu == pytest.approx((expected,))
    for signature in (scores.bleu_signature, scores.sentence_bleu_signature):
        assert f"|tok:{tokenize}|" in signature and "nrefs:1|" in signature and "|version:2.6.0" in signature
    assert "|eff:no|" in scores.bleu_signature and "|eff:yes|" in scores.sentence_bleu_signature
    assert scores.chrf_signature == "nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:2.6.0"


@settings(deadline=None, max_examples=80)
@given(PAIRS)
def test_against_the_formulas(pairs):
    scores = scores_of(pairs)
    assert scores.examples == len(pairs)
    assert scores.bleu == pytest.approx(bleu(pairs), abs=1e-9)
    assert scores.chrf == pytest.approx(chrf(pairs), abs=1e-9)
    # A sentence counts the orders that it has.
    each = [bleu([pair], min(4, max(1, len(pair[0].split())))) for pair in pairs]
    assert scores.sentence_bleu == pytest.approx(each, abs=1e-9)


@settings(deadline=None, max_examples=20)
@given(st.permutations(range(len(MIXED))))
def test_the_order_of_the_examples_does_not_matter(order):
    expected = dataclasses.asdict(scores_of(MIXED))
    got = dataclasses.asdict(scores_of([MIXED[index] for index in order]))
    each = expected.pop("sentence_bleu")
    assert got.pop("sentence_bleu") == tuple(each[index] for index in order)
    assert got == expected


def test_intervals_of_two_examples():
    # A quarter of the draws takes the right one twice, a quarter the wrong one.
    scores = scores_of([("eins zwei drei vier fünf", "eins zwei drei vier fünf"), ("qq xx", "bb ll")], resamples=200)
    assert scores.bleu_interval == pytest.approx((0.0, 100.0)) and scores.chrf_interval == pytest.approx((0.0, 100.0))
    assert 0.0 < scores.bleu < 100.0 and 0.0 < scores.chrf < 100.0
    same = scores_of([MIXED[0]] * 7)
    assert same.bleu_interval == pytest.approx((same.bleu,) * 2)


def test_intervals_are_as_wide_as_sacrebleus_own():
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    pairs = MIXED * 20
    scores = scores_of(pairs, resamples=1000)
    for metric, (low, high) in ((BLEU(), scores.bleu_interval), (CHRF(), scores.chrf_interval)):
        score = metric.corpus_score([h for h, _ in pairs], [[r for _, r in pairs]], n_bootstrap=1000)
        told = json.loads(score.format(width=6, is_json=True, signature="a:b"))
        assert (high - low) / 2 == pytest.approx(told["confidence_var"], rel=0.15)
        assert (high + low) / 2 == pytest.approx(told["confidence_mean"], abs=0.15 * told["confidence_var"])


def test_the_seed_decides():
    assert scores_of(MIXED) == scores_of(MIXED)
    # One resample each, so that both ends are its score.
    first, other = (scores_of(MIXED, resamples=1, seed=seed).chrf_interval for seed in (0, 1))
    assert first[0] == first[1] != other[0] == other[1]


@pytest.mark.parametrize("pair", [("", ""), ("", "ein Hund"), ("ein Hund", ""), ("ein Hund", "das war sie")])
def test_nothing_right_scores_zero(pair):
    scores = scores_of([pair])
    assert (scores.bleu, scores.sentence_bleu, scores.bleu_interval) == (0.0, (0.0,), (0.0, 0.0))
    if pair != ("ein Hund", "das war sie"):
        assert (scores.chrf, scores.chrf_interval) == (0.0, (0.0, 0.0))


def test_an_empty_side_in_a_corpus():
    right = ("eins zwei drei vier", "eins zwei drei vier")
    short = scores_of([right, ("", "eins zwei drei vier")])
    assert short.bleu == pytest.approx(100 * math.exp(1 - 8 / 4)) and short.sentence_bleu == pytest.approx((100.0, 0.0))
    # Precision 1, recall 1/2.
    assert short.chrf == pytest.approx(100 * 5 * 0.5 / 4.5)
    more = scores_of([right, ("neun", "")])
    assert more.bleu == pytest.approx(100 * (4 / 5) ** 0.25) and more.chrf == pytest.approx(100.0)
    nothing = scores_of([right, ("", "")])
    assert nothing.bleu == pytest.approx(100.0) and nothing.sentence_bleu == pytest.approx((100.0, 0.0))


@pytest.mark.parametrize(
    "language, tokenize",
    [("zh", "zh"), ("zh-Hant", "zh"), ("ZH_CN", "zh"), ("ja", "char"), ("th", "char"), ("de", "13a"), ("xx", "13a")],
)
def test_the_language_decides_how_words_are_split(language, tokenize):
    scores = scores_of([("我爱北京和上海", "我爱北京和广州")], language=language)
    assert f"|tok:{tokenize}|" in scores.bleu_signature and f"|tok:{tokenize}|" in scores.sentence_bleu_signature
    if tokenize == "13a":
        assert scores.bleu == 0.0
    else:
        # 5 of 7 characters, 4 of 6 pairs, 3 of 5 and 2 of 4.
        assert scores.bleu == pytest.approx(100 * (5 / 7 * 4 / 6 * 3 / 5 * 2 / 4) ** 0.25)


@pytest.mark.parametrize(
    "hypotheses, references, options, error, message",
    [
        ([], [], {}, InputError, "no translations"),
        (["a"], ["a", "b"], {}, ValueError, "1 hypotheses for 2 references"),
        (["a"], ["a"], {"tokenize": "spm"}, InputError, "tokenize='spm': must be one of 13a"),
    ],
)
def test_refuses(hypotheses, references, options, error, message):
    with pytest.raises(error, match=message):
        translation_scores(hypotheses, references, **options)


def test_importing_it_does_not_load_sacrebleu():
    code = "import sys, llm.evaluation.translation; print('sacrebleu' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "False", result.stderr
