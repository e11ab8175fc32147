"""Duplicates: what goes, what stays in its place, and that nothing else decides it (C29)."""

import numpy as np
import pytest

from llm.data import dedup
from llm.data.dedup import Contamination, band_keys, document_stages, drop_parts, exact_key, jaccard, shingles
from llm.data.documents import Document, Dropped, Tally, apply
from llm.data.duplicates import Table, exact_duplicates, frequent, near_duplicates
from llm.data.spec import DedupSpec
from llm.data.word_units import normalised_words

SPEC = DedupSpec(near=True)


def table(texts, evaluation=(), ids=None):
    return Table(
        exact=np.array([np.frombuffer(exact_key(t), np.uint64) for t in texts]).reshape(-1, 2),
        length=np.array([len(t) for t in texts]),
        text=np.array([int(Document("", t).hash[:16], 16) for t in texts], np.uint64),
        id=np.arange(len(texts), dtype=np.uint64) if ids is None else ids.astype(np.uint64),
        evaluation=np.isin(np.arange(len(texts)), evaluation),
    )


def near(texts, spec=SPEC, evaluation=(), ids=None):
    found = [shingles(t, spec.shingle) for t in texts]
    keys = band_keys(found, spec)
    return near_duplicates(
        table(texts, evaluation, ids),
        [keys.T],
        np.ones(len(texts), bool),
        found.__getitem__,
        spec.threshold,
    )[0]


def words(n, seed=0, vocabulary=5000):
    return [f"w{i}" for i in np.random.default_rng(seed).integers(0, vocabulary, n)]


def test_exact_duplicates_keep_one_of_each():
    removals = exact_duplicates(table(["hello world", "good bye", "Hello,  world!"]))
    # the longest stays
    assert [(r.document, r.kept, r.similarity) for r in removals] == [(0, 2, 1.0)]
    assert exact_duplicates(table(["a", "b", "a b"])) == []


def test_texts_without_words_equal_only_themselves():
    removals = exact_duplicates(table(["...", "!!!", "", "", "...", ""]))
    assert sorted(r.document for r in removals) == [3, 4, 5]
    assert near(["...", "!!!", "", "..."]) == []
    assert not band_keys([shingles("...", 5), shingles("", 5)], SPEC).any()


def test_short_texts_are_near_only_to_the_same_words():
    assert near(["one two", "three four", "five"]) == []
    assert len(near(["one two", "One, two", "two one"])) == 1


def test_an_evaluation_text_stays_and_its_twins_in_training_go():
    texts = ["one text here", "one text here", "One text, here!"]
    removals = exact_duplicates(table(texts, evaluation=[0]))
    assert {(r.document, r.kept) for r in removals} == {(1, 0), (2, 0)}
    assert exact_duplicates(table(texts[:2], evaluation=[0, 1])) == []
    long = " ".join(words(200))
    assert [(r.document, r.kept) for r in near([long + " and more", long], evaluation=[1])] == [(0, 1)]
    assert near([long + " and more", long], evaluation=[0, 1]) == []


def edited(base, share, seed):
    """A copy of which that share of words is new."""
    rng = np.random.default_rng(seed)
    return [f"n{seed}_{i}" if rng.random() < share else w for i, w in enumerate(base)]


def test_a_chain_does_not_take_out_its_ends():
    base = words(300)
    a, b, c = base, base[:270] + words(30, 7), base[:240] + words(60, 7)
    texts = [" ".join(t) for t in (a, b, c)]
    s = [shingles(t, 5) for t in texts]
    ab, bc, ac = jaccard(s[0], s[1]), jaccard(s[1], s[2]), jaccard(s[0], s[2])
    assert ab > 0.75 and ac < 0.7 and bc > 0.5  # the chain that the test is about
    removals = near(texts, DedupSpec(near=True, threshold=0.75, bands=40, rows=4))
    kept = {0, 1, 2} - {r.document for r in removals}
    assert kept and all(r.kept in kept and r.similarity >= 0.75 for r in removals)
    for removal in removals:
        assert removal.similarity == pytest.approx(jaccard(s[removal.document], s[removal.kept]))


def test_two_pairs_in_one_bucket_leave_two():
    one, two = words(400, 1), words(400, 2)
    texts = [" ".join(t) for t in (one, two, one[:-3], two[:-3])]
    removals = near(texts)
    assert {(r.document, r.kept) for r in removals} == {(2, 0), (3, 1)}
    # even when every document falls into one bucket, only verified pairs count
    found = [shingles(t, 5) for t in texts]
    all_alike = near_duplicates(
        table(texts), [np.full((1, 4), 9, np.uint64)], np.ones(4, bool), found.__getitem__, 0.8
    )[0]
    assert {(r.document, r.kept) for r in all_alike} == {(2, 0), (3, 1)}


def test_unrelated_texts_both_stay():
    assert near([" ".join(words(2000, 1, 300)), " ".join(words(2000, 2, 300))]) == []


def test_against_brute_force_in_any_order():
    documents = []
    for family in range(40):
        base = words(150, family)
        documents += [base] + [
            edited(base, share, 100 * family + k) for k, share in enumerate((0.005, 0.01, 0.03, 0.3))
        ]
    texts = [" ".join(d) for d in documents]
    spec = DedupSpec(near=True, threshold=0.8, bands=60, rows=3)  # a pair of .8 is missed once in 10^19
    found = [shingles(t, 5) for t in texts]
    order = sorted(range(len(texts)), key=lambda i: (-len(texts[i]), int(Document("", texts[i]).hash[:16], 16)))
    kept: list[int] = []
    for i in order:
        a = set(found[i].tolist())
        if all(len(a & (b := set(found[j].tolist()))) / len(a | b) < 0.8 for j in kept):
            kept.append(i)
    assert 80 < len(kept) < 150
    removals = near(texts, spec)
    assert set(range(200)) - {r.document for r in removals} == set(kept)
    assert len({r.document for r in removals}) == len(removals) == 200 - len(kept)
    shuffled = np.random.default_rng(3).permutation(200)
    again = near([texts[i] for i in shuffled], spec, ids=shuffled)
    assert {int(shuffled[r.document]) for r in again} == {r.document for r in removals}


@pytest.mark.parametrize("similarity, expected", [(0.5, 0.053), (0.7, 0.565), (0.8, 0.923), (0.9, 0.9995)])
def test_the_catch_rate_is_the_formula(similarity, expected):
    """1 - (1 - s^8)^14, within four standard deviations over 400 pairs of sets of exactly that similarity."""
    pairs, size = 400, 300
    rng = np.random.default_rng(int(similarity * 10))
    shared = round(2 * size * similarity / (1 + similarity))
    sets = []
    for _ in range(pairs):
        values = rng.integers(0, 2**63, 2 * size - shared).astype(np.uint64)
        sets += [np.unique(values[:size]), np.unique(values[size - shared :])]
    keys = band_keys(sets, SPEC)
    caught = (keys[0::2] == keys[1::2]).any(axis=1).mean()
    exact = 1 - (1 - similarity**8) ** 14
    assert exact == pytest.approx(expected, abs=0.006)
    assert abs(caught - exact) < 4 * (exact * (1 - exact) / pairs) ** 0.5 + 0.004


def test_chinese_is_compared_by_characters():
    text = "中国人民解放军在北京举行了盛大的阅兵仪式，各界群众热烈欢呼，场面十分壮观。" * 3
    other = "今天天气很好，我们一起去公园散步，看见了许多美丽的花朵和可爱的小鸟在唱歌。" * 3
    assert len(shingles(text, 5)) > 25
    assert [(r.document, r.kept) for r in near([text, text.replace("。", "！") + "了", other])] == [(0, 1)]


def test_shingles_are_those_of_the_words():
    text = "The cat sat on the mat, the CAT sat on the mat."
    w = normalised_words(text)
    grams = {tuple(w[i : i + 5]) for i in range(len(w) - 4)}
    assert len(shingles(text, 5)) == len(grams) == 6
    assert not np.array_equal(shingles("a b", 2), shingles("b a", 2))


def stage_result(stage, text):
    tally = Tally("x")
    return list(apply(stage, [Document("d", text)], tally)), tally


def test_repeated_lines_and_paragraphs_of_one_document():
    line = "This line is long enough to count."
    stages = dict(document_stages(DedupSpec(document_lines=True, document_paragraphs=True)))
    found, tally = stage_result(
        stages["repeated lines"], f"{line}\nshort\n{line}\nshort\nanother line, also long enough\n"
    )
    assert found[0].text == f"{line}\nshort\nshort\nanother line, also long enough\n"
    assert tally.changed == {"repeated line": [1, 1, [{"id": "d", "detail": line}]]}
    found, _ = stage_result(stages["repeated paragraphs"], f"{line}\nmore\n\nmiddle\n\n{line}\nmore\n")
    assert found[0].text == f"{line}\nmore\n\nmiddle\n"
    assert document_stages(DedupSpec()) == []


def test_lines_of_many_documents():
    footer, own = "Copyright 2020 by the example company", "a line that stands only here, {}"
    documents = [Document(str(i), f"{own.format(i)}\n{footer}\n") for i in range(5)] + [Document("5", footer + "\n")]
    own_keys = [np.unique(dedup.line_keys(d.text.split("\n"), 20)) for d in documents]
    parts = [np.sort(np.concatenate(own_keys[k::2])) for k in (0, 1)]
    listed = frequent(parts, more_than=5)
    assert len(listed) == 1 and len(frequent(parts, more_than=6)) == 0
    note: list = []
    found = [drop_parts(d, lambda *a, **k: note.append(1), "line", 20, listed) for d in documents]
    assert [d.text for d in found[:5] if isinstance(d, Document)] == [own.format(i) + "\n" for i in range(5)]
    assert found[5] == Dropped("nothing but lines of many documents")
    keys = np.random.default_rng(0).integers(0, 2**64, 4000, dtype=np.uint64)
    many = np.sort(np.concatenate([keys, keys[:100], keys[:100]]))
    assert np.array_equal(frequent([many[::2], many[1::2]], 2), np.sort(keys[:100]))


def test_contamination():
    question = "which river flows through the old town of the city that was founded by the romans"
    short = "a short question of few words"
    found = Contamination.of([Document("q1", question), Document("q2", short)], 13)
    clean, dirty = "nothing of it stands here at all " * 5, f"Answer: WHICH river, {question[12:]}? Tiber."
    assert isinstance(found.stage(Document("a", clean), lambda *_: None), Document)
    dropped = found.stage(Document("b", dirty), lambda *_: None)
    assert isinstance(dropped, Dropped) and "'q1'" in dropped.detail and dropped.reason == "contamination"
    twelve = " ".join(question.split()[:12])
    assert isinstance(found.stage(Document("c", twelve + " else"), lambda *_: None), Document)
    assert isinstance(found.stage(Document("d", short), lambda *_: None), Document)
