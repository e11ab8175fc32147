"""Preparation: cleaning, splitting, packing, batches; and what a prepared folder promises."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.data import Dataset, DataSpec, batch_at, open_prepared, prefetch, prepare, sequential
from llm.data.clean import clean
from llm.data.objectives import KEYS, causal
from llm.data.pack import pack, token_dtype
from llm.data.sources import Document, packaged_corpora, read
from llm.data.split import check_disjoint, split
from llm.errors import InputError
from llm.tokenization import TokenizerSpec

END = 0


def test_the_embedded_corpus_is_six_novels():
    assert packaged_corpora() == ["austen"]
    documents = read("austen")
    assert [d.id for d in documents] == [
        "emma", "mansfield_park", "northanger_abbey", "persuasion", "pride_and_prejudice", "sense_and_sensibility",
    ]  # fmt: skip
    persuasion = documents[3].text
    assert len(persuasion.encode()) == 466_854 and persuasion.startswith("Persuasion\n")


def test_folders_txt_and_jsonl(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_bytes("\ufeffcafé\r\n".encode())
    (tmp_path / "sub" / "a.txt").write_text("second")
    (tmp_path / "c.jsonl").write_text('{"text": "one", "id": "x", "lang": "en"}\n\n{"text": "line\u2028two"}\n')
    (tmp_path / "ignored.pdf").write_bytes(b"\xff")
    found = read(str(tmp_path))
    assert [(d.id, d.text) for d in found] == [
        ("b", "café\r\n"), ("x", "one"), ("c.jsonl:3", "line\u2028two"), ("sub/a", "second"),
    ]  # fmt: skip
    assert found[1].meta == {"lang": "en", "source": f"{tmp_path / 'c.jsonl'}:1"}


def test_cleaning():
    dirty = "\ufeffA cafe\u0301  \r\nsecond\rthird\x00\x07\t\n\n\n\n\nlast\x85  "
    assert clean(Document("x", dirty)).text == "A caf\u00e9\nsecond\nthird\n\nlast\n"
    assert clean(Document("x", " \n\t\n")).text == ""
    once = clean(Document("x", dirty))
    assert clean(once) == once


def documents(n=200):
    return [Document(str(i), f"text number {i}\n" * 3) for i in range(n)]


def test_split_by_hash_is_stable_when_documents_are_added():
    spec = DataSpec(train="x", validation_fraction=0.2)
    _, small = split(spec, documents(100))
    _, large = split(spec, documents(200)[::-1])
    assert {d.id for d in small} == {d.id for d in large if int(d.id) < 100}
    assert 20 < len(large) < 60


def test_split_by_tail_and_holdout():
    train, validation = split(DataSpec(train="x", split_by="tail", validation_fraction=0.34), documents(3))
    assert [d.text for d in train] == [f"text number {i}\n" * 2 for i in range(3)]
    assert [a.text + b.text for a, b in zip(train, validation)] == [d.text for d in documents(3)]
    train, validation = split(DataSpec(train="x", holdout=("1",)), documents(3))
    assert [d.id for d in train] == ["0", "2"] and [d.id for d in validation] == ["1"]
    with pytest.raises(InputError, match="same text"):
        check_disjoint(train, [Document("copy", train[0].text)])


def test_split_by_tail_of_texts_without_line_ends():
    texts = ["one line of several words without any end", "wordwithoutspace" * 4]
    train, validation = split(
        DataSpec(train="x", split_by="tail", validation_fraction=0.25), [Document(t, t) for t in texts]
    )
    assert [a.text + b.text for a, b in zip(train, validation)] == texts
    assert train[0].text == "one line of several words " and len(validation[1].text) == 16


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(1, 90), max_size=14), min_size=1, max_size=8), st.integers(2, 9))
def test_packing_neither_loses_nor_doubles_nor_crosses(docs, row_length):
    rows = pack(docs, row_length, END, np.uint16)
    batch = causal(**{f"{k}_BT": rows[k] for k in ("tokens", "targets", "segments")})
    real = batch["weights"].reshape(-1) > 0
    tokens, targets = batch["tokens"].reshape(-1)[real], batch["targets"].reshape(-1)[real]
    assert tokens.tolist() == [t for d in docs for t in [END, *d]]
    assert targets.tolist() == [t for d in docs for t in [*d, END]]
    assert not real[len(tokens) :].any()
    for row in range(len(batch["tokens"])):
        segments, positions = batch["segments"][row], batch["positions"][row]
        assert segments[0] in (0, 1)
        for t in range(1, row_length):
            new = segments[t] != segments[t - 1]
            assert positions[t] == (0 if new else positions[t - 1] + 1)
            assert segments[t] in (segments[t - 1], segments[t - 1] + 1, 0)
            if segments[t] and not new:
                assert batch["targets"][row, t - 1] == batch["tokens"][row, t]
            if new and segments[t]:
                assert batch["targets"][row, t - 1] == END
        assert positions[0] == 0


def test_a_document_that_fills_its_row_and_one_of_length_one():
    rows = pack([[5, 6, 7], [8], [9, 9]], 4, END, np.uint16)
    assert rows["tokens"].tolist() == [[0, 5, 6, 7], [0, 8, 0, 9], [9, 0, 0, 0]]
    assert rows["targets"].tolist() == [[5, 6, 7, 0], [8, 0, 9, 9], [0, 0, 0, 0]]
    assert rows["segments"].tolist() == [[1, 1, 1, 1], [1, 1, 2, 2], [1, 0, 0, 0]]


def test_dtype_of_the_id_range():
    for vocab, dtype in ((65536, np.uint16), (65537, np.uint32), (100_000, np.uint32)):
        assert token_dtype(vocab) == dtype
    ids = [65535, 65536, 70000]
    assert pack([ids], 4, END, token_dtype(70001))["targets"][0, :3].tolist() == ids


def dataset(rows=11):
    tokens = np.arange(rows, dtype=np.uint16)[:, None].repeat(4, 1)
    return Dataset(tokens, tokens, np.ones((rows, 4), np.int32), text_bytes=rows)


def test_batches_are_a_function_of_seed_and_step_and_drop_nothing():
    data = dataset()

    def ids(step, **how):
        return batch_at(data, how.pop("seed", 0), step, 4, **how)["tokens"][:, 0].tolist()

    stream = [i for step in range(11) for i in ids(step)]
    for epoch in range(4):  # four epochs of 11 rows in 11 batches of 4
        assert sorted(stream[epoch * 11 : (epoch + 1) * 11]) == list(range(11))
    assert stream[:11] != stream[11:22] != list(range(11))
    assert ids(7) == ids(7) and ids(7) != ids(7, seed=1)
    for parts in (1, 2, 4):  # any number of hosts sees the same global batch
        assert [i for part in range(parts) for i in ids(7, part=part, parts=parts)] == ids(7)


def test_every_batch_has_the_keys_of_the_contract():
    batch = batch_at(dataset(), 0, 0, 4)
    assert tuple(batch) == KEYS
    assert {k: v.dtype.name for k, v in batch.items()} == {k: "float32" if k == "weights" else "int32" for k in KEYS}
    assert all(v.shape == (4, 4) for v in batch.values())


def test_sequential_shows_every_row_once_and_fills_up_with_weight_0():
    batches = list(sequential(dataset(), 4))
    assert [b["tokens"].shape for b in batches] == [(4, 4)] * 3
    kept = np.concatenate([b["tokens"][b["weights"][:, 0] > 0, 0] for b in batches])
    assert kept.tolist() == list(range(11)) and batches[-1]["weights"][3].sum() == 0
    assert sum(b["weights"].sum() for b in sequential(dataset(), 4, limit=5)) == 20


def test_prefetch_keeps_order_and_passes_errors_on():
    assert list(prefetch(lambda n: {"n": n}, range(5))) == [{"n": n} for n in range(5)]

    def fails(n):
        if n == 2:
            raise ValueError("row 2")
        return {"n": n}

    with pytest.raises(ValueError, match="row 2"):
        list(prefetch(fails, range(5)))


SPEC, TOKENIZER = {"row_length": 32, "holdout": ("part7",)}, TokenizerSpec(vocab_size=300)


def test_preparing_twice_gives_the_same_and_no_text_is_lost(corpus, tmp_path):
    spec = DataSpec(train=str(corpus), **SPEC)
    first = prepare(spec, TOKENIZER, tmp_path / "a", say=lambda _: None)
    second = prepare(spec, TOKENIZER, tmp_path / "b", say=lambda _: None)
    assert first.fingerprint == second.fingerprint
    for split_, names in ((first.validation, ["part7"]), (first.train, [f"part{n}" for n in range(7)])):
        tokens, real = split_.tokens.reshape(-1), split_.segments.reshape(-1) != 0
        text = first.tokenizer.bytes(tokens[real]).decode()
        wanted = "".join("<|endoftext|>" + clean(Document("", (corpus / f"{n}.txt").read_text())).text for n in names)
        assert text == wanted
        assert split_.text_bytes == len(wanted.replace("<|endoftext|>", "").encode())
    assert first.report["train"]["tokens"] == int((first.train.segments != 0).sum())
    assert first.report["validation"]["ids"] == ["part7"]


def test_an_interrupted_preparation_leaves_no_data(corpus, tmp_path, monkeypatch):
    from llm.data import preparation as module

    spec = DataSpec(train=str(corpus), **SPEC)
    monkeypatch.setattr(module, "_fingerprint", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare(spec, TOKENIZER, tmp_path, say=lambda _: None)
    assert not (tmp_path / "data").exists()
    monkeypatch.undo()
    assert len(prepare(spec, TOKENIZER, tmp_path, say=lambda _: None).train) > 100
    assert not (tmp_path / "data.partial").exists()


def test_damaged_data_is_refused(corpus, tmp_path):
    prepare(DataSpec(train=str(corpus), **SPEC), TOKENIZER, tmp_path, say=lambda _: None)
    report = json.loads((tmp_path / "data" / "report.json").read_text())
    assert report["settings"]["tokenizer"] == {"kind": "bpe", "vocab_size": 300}
    (tmp_path / "data" / "train.targets.npy").unlink()
    with pytest.raises(InputError, match="is damaged"):
        open_prepared(tmp_path)
