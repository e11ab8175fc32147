"""Rows that follow the text: streams for models that carry a state, and the row before as the source."""

import json

import numpy as np
import pytest

from llm.data import ObjectiveSpec, Preparation, batch_at, open_prepared, prepare, sequential
from llm.data.sources import read_all
from llm.data.spec import CleanSpec, DataSpec, DedupSpec
from llm.errors import InputError
from llm.tokenization.spec import TokenizerSpec
from tests.helpers import write_corpus

STREAM = ObjectiveSpec(stream=True)
FOLLOWS = ObjectiveSpec(kind="continuation")


def spec(corpus, objective, packing="concatenate"):
    data = DataSpec(train=str(corpus), holdout=("part7",), row_length=32, packing=packing)
    return Preparation(data, CleanSpec(), DedupSpec(), TokenizerSpec(vocab_size=300), objective)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream")
    (folder / "corpus").mkdir()
    prepare(spec(write_corpus(folder / "corpus"), STREAM), folder / "run", quiet=True)
    return folder / "run"


def test_each_row_of_a_stream_goes_on_where_it_ended(workdir):
    train = open_prepared(workdir, STREAM).train
    rows = train.rows(np.arange(len(train)), 0, np.int64(0))
    B = 4
    steps = -(-len(train) // B)
    batches = [batch_at(train, 0, step, B) for step in range(steps)]
    seen = []
    for lane in range(B):
        walked = [b["tokens"][lane] for b in batches if b["segments"][lane].any()]
        start = lane * len(train) // B
        for number, tokens in enumerate(walked):
            np.testing.assert_array_equal(tokens, rows["tokens"][start + number])
        for number, b in enumerate(batches[: len(walked)]):
            plan = train.plan
            inside = plan.start[plan.splits[start + number]] > 0
            assert b["continues"][lane] == (number > 0 and inside)
        seen += range(start, start + len(walked))
    assert seen == list(range(len(train))), "every row once an epoch"
    assert {0, 1} == {int(x) for b in batches for x in b["continues"]}
    empty = [b for b in batches if not b["segments"].all(axis=1).all()]
    assert empty and all(b["weights"].sum() == (b["segments"] != 0).sum() for b in empty)
    # The next epoch walks the same stretches, each from a fresh state.
    again = batch_at(train, 0, steps, B)
    np.testing.assert_array_equal(again["tokens"], batches[0]["tokens"])
    assert not again["continues"].any()


def test_hosts_share_a_stream(workdir):
    train = open_prepared(workdir, STREAM).train
    whole = batch_at(train, 0, 3, 4)
    parts = [batch_at(train, 0, 3, 4, mine) for mine in np.arange(4).reshape(2, -1)]
    for key, value in whole.items():
        np.testing.assert_array_equal(value, np.concatenate([p[key] for p in parts]))


def test_the_row_before_is_the_source_where_its_document_goes_on(workdir):
    train, rows = open_prepared(workdir, FOLLOWS).train, open_prepared(workdir, ObjectiveSpec()).train
    indices = np.arange(len(train))
    batch, plain = train.rows(indices, 0, np.int64(0)), rows.rows(indices, 0, np.int64(0))
    for key in ("tokens", "targets", "weights", "segments"):
        np.testing.assert_array_equal(batch[key], plain[key])
    starts = rows.plan.start[rows.plan.splits[:-1]] > 0
    assert starts.any() and not starts.all()
    for row in indices:
        source = batch["source_tokens"][row][batch["source_segments"][row] != 0]
        if not starts[row]:
            assert not len(source)
            continue
        before = plain["tokens"][row - 1][plain["segments"][row - 1] == plain["segments"][row - 1].max()]
        np.testing.assert_array_equal(source, before)
        # The last token before the row is the row's first input: nothing is told twice, nothing is left out.
        assert batch["tokens"][row][0] == plain["targets"][row - 1][-1]
        assert batch["segments"][row][0] == 1 and set(batch["source_segments"][row]) <= {0, 1}


def test_evaluation_of_a_stream_reads_each_row_behind_the_row_before(workdir):
    prepared = open_prepared(workdir, STREAM)
    plain = open_prepared(workdir, ObjectiveSpec()).validation
    count = 0
    for batch in sequential(prepared.validation, 5):
        rows = plain.rows(np.arange(count, min(count + 5, len(plain))), 0, np.int64(0))
        real = len(rows["tokens"])
        np.testing.assert_array_equal(batch["tokens"][:real, 32:], rows["tokens"])
        np.testing.assert_array_equal(batch["weights"][:real, 32:], rows["weights"])
        assert not batch["weights"][:, :32].any()
        for row in range(real):
            if count + row:  # one document: all but the first row go on
                np.testing.assert_array_equal(
                    batch["tokens"][row, :32], plain.rows(np.array([count + row - 1]), 0, np.int64(0))["tokens"][0]
                )
                assert batch["segments"][row, 31] == batch["segments"][row, 32] == 1
            else:
                assert not batch["segments"][row, :32].any()
        count += real
    assert count == len(plain)


@pytest.mark.parametrize("objective", [STREAM, FOLLOWS])
def test_rows_out_of_order_are_refused(workdir, tmp_path, objective):
    with pytest.raises(InputError, match="data.packing='best_fit' does not keep its order"):
        prepare(spec(workdir.parent / "corpus", objective, packing="best_fit"), tmp_path, quiet=True)


def test_a_stream_is_for_next_tokens():
    with pytest.raises(InputError, match="objective.stream=True is for 'causal'"):
        ObjectiveSpec(kind="masked", stream=True)


def test_further_sources_are_read_after_the_first(tmp_path):
    for name, words in (("a", "one two three"), ("b", "four five six")):
        lines = (f'{{"id": "{n}", "text": "{words} {name}{n}"}}\n' for n in range(30))
        (tmp_path / f"{name}.jsonl").write_text("".join(lines) + '{"id": "same", "text": "the same"}\n')
    a, b = str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")
    data = DataSpec(train=a, more=(b,), packing="whole", row_length=16)
    made = prepare(
        Preparation(data, CleanSpec(), DedupSpec(), TokenizerSpec(vocab_size=300), ObjectiveSpec()),
        tmp_path / "run", quiet=True,
    )  # fmt: skip
    assert made is not None
    assert len(made.train) + len(made.validation) == 61  # what stands in both stays once
    with pytest.raises(InputError, match="each once"):
        DataSpec(train=a, more=(a,))
    with pytest.raises(InputError, match="there is no corpus"):
        prepare(
            Preparation(DataSpec(train=a, more=("nowhere",)), CleanSpec(), DedupSpec(), TokenizerSpec(vocab_size=300),
                        ObjectiveSpec()),
            tmp_path / "other", quiet=True,
        )  # fmt: skip


def test_each_source_has_its_prefix(tmp_path):
    """Before the first field, whichever it is; what is blank stays blank."""
    for name in "ab":
        pairs = [{"text": f"{name} {n}", "target": f"{name}{n} target"} for n in range(30)]
        lines = map(json.dumps, [*pairs, {"text": " ", "target": "no source"}])
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    a, b = (str(tmp_path / f"{name}.jsonl") for name in "ab")
    of = dict(train=a, more=(b,), prefixes=("first: ", "second: "), packing="whole", row_length=32)
    pair = DataSpec(**of, fields=("text", "target"))
    for source, text in ((a, "first: a"), (b, "second: b")):
        found = read_all(pair, source)
        assert [d.text for d in found] == [f"{text} {n}" for n in range(30)]
        assert found[7].meta["target"] == f"{text[-1]}7 target"
    (turned,) = [d for d in read_all(DataSpec(**of, fields=("target", "text")), b) if d.text == "b 7"]
    assert turned.meta["target"] == "second: b7 target"

    made = prepare(
        Preparation(pair, CleanSpec(), DedupSpec(), TokenizerSpec(kind="bytes", vocab_size=257),
                    ObjectiveSpec(kind="seq2seq")),
        tmp_path / "run", quiet=True,
    )  # fmt: skip
    assert made is not None and len(made.train) + len(made.validation) == 60
    read = set()
    for side in (made.train, made.validation):
        batch = side.rows(np.arange(len(side)), 0, np.int64(0))
        for row, seen in zip(batch["source_tokens"], batch["source_segments"]):
            read.add(made.tokenizer.decode(row[(seen != 0) & (row != made.tokenizer.end_of_text)].tolist()))
    assert read == {f"{text} {n}" for text in ("first: a", "second: b") for n in range(30)}

    with pytest.raises(InputError, match="1 texts for 2 sources"):
        DataSpec(train=a, more=(b,), prefixes=("first: ",))
    with pytest.raises(InputError, match="leave data.validation and data.answer empty"):
        DataSpec(train=a, more=(b,), prefixes=("first: ", "second: "), validation=a)
