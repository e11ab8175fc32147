"""Shards, packing plans, permutations: nothing lost, nothing doubled, nothing across a border."""

import json
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.data.objectives import causal
from llm.data.pack import Plan, best_fit, concatenate, plan, rows
from llm.data.permutation import permute
from llm.data.shards import MAGIC, Shards, ShardWriter, token_dtype
from llm.errors import InputError

END = 0


def shards(folder, documents, vocab_size=100, parts=1, fields=("text",), labels=()):
    """Documents (lists of ids, or one list a field) in `parts` shards."""
    paths = []
    for part in range(parts):
        mine = documents[part * len(documents) // parts : (part + 1) * len(documents) // parts]
        path = folder / f"{part:05d}.train.tokens"
        writer = ShardWriter(path, vocab_size=vocab_size, fields=fields, labels=labels, tokenizer="t", seed=3)
        for number, document in enumerate(mine):
            sequences = [document] if len(fields) == 1 else document
            writer.add(sequences, [number] * len(labels), text_bytes=10, name=str(number))
        writer.close()
        if path.is_file():
            paths.append(path)
    return Shards.open(paths)


@pytest.mark.parametrize("parts", [1, 3])
def test_shards_give_back_what_was_written(tmp_path, parts):
    documents = [[5, 6], [], [7], [8, 9, 10], [11], [99]]
    found = shards(tmp_path, documents, parts=parts)
    assert len(found) == 6 and found.tokens == 8 and found.text_bytes == 60
    assert [found.sequence(i).tolist() for i in range(6)] == documents
    assert found.lengths()[:, 0].tolist() == [2, 0, 1, 3, 1, 1]
    places = np.array([[7, 0], [3, 3]])
    assert found.take(places).tolist() == [[99, 5], [8, 8]]
    assert not list(tmp_path.glob("*partial*"))


def test_shards_of_several_fields_with_labels(tmp_path):
    found = shards(
        tmp_path, [([1, 2], [3]), ([], [4, 5]), ([6], [])], fields=("text", "target"), labels=("label",), parts=2
    )
    assert found.lengths().tolist() == [[2, 1], [0, 2], [1, 0]]
    assert found.sequence(1, 1).tolist() == [4, 5] and found.sequence(2, 0).tolist() == [6]
    assert found.labels(np.array([2, 0, 1])).tolist() == [[1], [0], [0]]


def test_the_header_says_what_the_file_is(tmp_path):
    shards(tmp_path, [[5, 6], [7]], vocab_size=70001)
    data = (tmp_path / "00000.train.tokens").read_bytes()
    length = int.from_bytes(data[8:16], "little")
    assert data[:8] == MAGIC and json.loads(data[16 : 16 + length]) == {
        "version": 1, "dtype": "uint32", "documents": 2, "tokens": 3, "text_bytes": 20, "vocab_size": 70001,
        "fields": ["text"], "labels": [], "tokenizer": "t", "seed": 3,
    }  # fmt: skip


def test_dtype_of_the_id_range(tmp_path):
    for vocab, dtype in ((65536, np.uint16), (65537, np.uint32), (100_000, np.uint32)):
        assert token_dtype(vocab) == dtype
    ids = [65535, 65536, 70000]
    assert shards(tmp_path, [ids], vocab_size=70001).sequence(0).tolist() == ids


def test_bad_shards_are_refused(tmp_path):
    with pytest.raises(InputError, match="3: token id 100 is outside the vocabulary of 100"):
        shards(tmp_path, [[1], [2], [3], [4, 100]])
    shards(tmp_path, [[5, 6], [7]])
    path = tmp_path / "00000.train.tokens"
    whole = path.read_bytes()
    for damaged, message in (
        (whole[:-2], "bytes, its header promises"), (whole + b"xx", "bytes, its header promises"),
        (b"nonsense" + whole[8:], "does not begin with"), (b"", "does not begin"),
        (whole[:20], "cut off in its header"),
    ):  # fmt: skip
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=message):
            Shards.open([path])
    path.write_bytes(whole)
    other = tmp_path / "other.tokens"
    writer = ShardWriter(other, vocab_size=100, fields=("text",), tokenizer="another")
    writer.add([[1]])
    writer.close()
    with pytest.raises(InputError, match="do not belong together: tokenizer"):
        Shards.open([path, other])


def test_a_document_that_fills_its_row_and_one_of_length_one(tmp_path):
    documents = [[5, 6, 7], [8], [9, 9]]
    found = rows(concatenate(np.array([3, 1, 2]), 4), shards(tmp_path, documents), np.arange(3), END, END)
    assert found["tokens"].tolist() == [[0, 5, 6, 7], [0, 8, 0, 9], [9, 0, 0, 0]]
    assert found["targets"].tolist() == [[5, 6, 7, 0], [8, 0, 9, 9], [0, 0, 0, 0]]
    assert found["segments"].tolist() == [[1, 1, 1, 1], [1, 1, 2, 2], [1, 0, 0, 0]]


documents_strategy = st.lists(st.lists(st.integers(1, 90), max_size=14), min_size=1, max_size=9)


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
@settings(max_examples=60, deadline=None)
@given(documents=documents_strategy, row_length=st.integers(2, 9), parts=st.integers(1, 3))
def test_packing_neither_loses_nor_doubles_nor_crosses(tmp_path_factory, packing, documents, row_length, parts):
    found = shards(tmp_path_factory.mktemp("shards"), documents, parts=min(parts, len(documents)))
    packed = plan(packing, found.lengths()[:, 0], row_length)
    batch = causal(**{f"{k}_BT": v for k, v in rows(packed, found, np.arange(len(packed)), END, END).items()})
    pieces: dict[int, list] = {number: [] for number in range(len(documents))}
    for row in range(len(packed)):
        at = 0
        for piece, index in enumerate(range(packed.splits[row], packed.splits[row + 1]), 1):
            document, start, length = (int(x[index]) for x in (packed.document, packed.start, packed.length))
            mine = slice(at, at + length)
            assert (batch["segments"][row, mine] == piece).all()
            assert batch["positions"][row, mine].tolist() == list(range(length))
            assert (batch["weights"][row, mine] == 1).all()
            pieces[document].append((start, batch["tokens"][row, mine].tolist(), batch["targets"][row, mine].tolist()))
            at += length
        assert at <= row_length and not batch["segments"][row, at:].any() and not batch["weights"][row, at:].any()
    for number, ids in enumerate(documents):
        ordered = sorted(pieces[number])
        assert [t for _, tokens, _ in ordered for t in tokens] == [END, *ids]
        assert [t for _, _, targets in ordered for t in targets] == [*ids, END]
    assert packed.tokens == sum(len(d) + 1 for d in documents)


def best_fit_one_by_one(sizes, row_length):
    """Rooms left by best-fit decreasing, a document at a time: the oracle."""
    rooms = []
    for size in sorted((s % row_length for s in sizes if s % row_length), reverse=True):
        fitting = [room for room in rooms if room >= size]
        if fitting:
            rooms.remove(min(fitting))
            rooms.append(min(fitting) - size)
        else:
            rooms.append(row_length - size)
    return sum(s // row_length for s in sizes), sorted(rooms)


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=40), row_length=st.integers(2, 17))
def test_best_fit_is_best_fit_decreasing(lengths, row_length):
    packed = best_fit(np.array(lengths), row_length)
    full, rooms = best_fit_one_by_one([n + 1 for n in lengths], row_length)
    used = np.add.reduceat(packed.length, packed.splits[:-1])
    assert sorted(row_length - used) == sorted([0] * full + rooms)
    # a document that fits into a row is never cut
    for number, n in enumerate(lengths):
        assert (packed.document == number).sum() == -(-(n + 1) // row_length)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=30), st.integers(2, 12))
def test_concatenation_is_the_stream_cut_into_rows(lengths, row_length):
    made = concatenate(np.array(lengths), row_length)
    stream = [(number, place) for number, n in enumerate(lengths) for place in range(n + 1)]
    for row in range(len(made)):
        pieces = range(made.splits[row], made.splits[row + 1])
        places = [(made.document[p], made.start[p] + k) for p in pieces for k in range(made.length[p])]
        assert places == stream[row * row_length : (row + 1) * row_length]
        assert len({made.document[p] for p in pieces}) == len(pieces)
    assert len(made) == -(-len(stream) // row_length)


def test_plans_of_many_documents_take_seconds():
    lengths = np.random.default_rng(0).geometric(1 / 600, 200_000)
    start = time.perf_counter()
    assert concatenate(lengths, 8192).tokens == best_fit(lengths, 8192).tokens == lengths.sum() + 200_000
    assert time.perf_counter() - start < 3


@pytest.mark.parametrize("parts", [1, 4])
def test_runs_of_tokens(tmp_path, parts):
    documents = [list(range(n % 60 + 1)) for n in range(120)]
    found = shards(tmp_path, documents, parts=parts)
    every = found.take(np.arange(found.tokens))
    rng = np.random.default_rng(0)
    for count in (0, 1, 5, 300):  # few runs are sliced, many are indexed
        which = rng.integers(0, 120, count)
        lengths = found.lengths()[which, 0]
        wanted = [every[found.offsets[d] : found.offsets[d] + n] for d, n in zip(which, lengths)]
        assert np.array_equal(found.runs(found.offsets[which], lengths), np.concatenate([[], *wanted]))
        # one beyond the end of the last shard is there, and any id
        assert len(found.runs(found.offsets[which], lengths + 1)) == lengths.sum() + count


def test_no_shard_is_refused():
    with pytest.raises(InputError, match="no token shard"):
        Shards.open([])


def test_best_fit_cuts_fewer_documents_at_little_cost():
    lengths = np.random.default_rng(0).integers(1, 400, 5000)
    whole, cut = best_fit(lengths, 256), concatenate(lengths, 256)
    assert whole.tokens == cut.tokens and len(whole) <= 1.01 * len(cut)
    assert len(whole.document) < 0.8 * len(cut.document)


def test_a_plan_is_saved_and_read(tmp_path):
    made = best_fit(np.array([3, 1, 2]), 4)
    made.save(tmp_path / "rows.npz")
    read = Plan.load(tmp_path / "rows.npz")
    assert read.row_length == 4 and all(np.array_equal(getattr(made, n), getattr(read, n)) for n in ("splits", "start"))


def test_permutations_are_bijections_that_differ():
    for n in range(1, 301):
        assert sorted(permute(np.arange(n), n, seed=5, epoch=2).tolist()) == list(range(n))
    orders = {tuple(permute(np.arange(50), 50, seed, epoch)) for seed in range(6) for epoch in range(6)}
    assert len(orders) == 36
    far = permute(np.array([0, 1, 2**40 - 1]), 2**40, 0, 0)
    assert len(set(far.tolist())) == 3 and (far < 2**40).all() and (far >= 0).all()
    assert permute(np.arange(3, 7), 100, 1, 1).tolist() == permute(np.arange(100), 100, 1, 1)[3:7].tolist()


@pytest.mark.parametrize("n", [3, 4, 5, 12, 16])
def test_permutations_are_uniform(n):
    draws = np.array([permute(np.arange(n), n, seed, 0) for seed in range(4000)])
    for place in (0, n // 2, n - 1):
        counts = np.bincount(draws[:, place], minlength=n)
        chi_square = ((counts - 4000 / n) ** 2 / (4000 / n)).sum()
        assert chi_square < n - 1 + 5 * (2 * (n - 1)) ** 0.5
    follows = (np.diff(draws, axis=1) == 1).mean()  # the next one follows by chance alone
    assert abs(follows - 1 / n) < 0.01
