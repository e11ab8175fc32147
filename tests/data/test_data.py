"""What preparing a small corpus gives and promises, called in this process."""

import json
import re

import numpy as np
import pytest

from llm.data import CleanSpec, DataSpec, DedupSpec, Preparation, open_prepared, prepare
from llm.data.documents import Document, Dropped, Tally, apply
from llm.data.loader import sequential
from llm.data.split import cut, held_out, sides
from llm.errors import InputError
from llm.tokenization import TokenizerSpec


def documents(n=200):
    return [Document(str(i), f"text number {i}\n" * 3) for i in range(n)]


def test_split_by_hash_is_stable_when_documents_are_added():
    spec = DataSpec(train="x", validation_fraction=0.2)
    small = {d.id for d in documents(100) if held_out(spec, d, False)}
    large = {d.id for d in documents(200)[::-1] if held_out(spec, d, False)}
    assert small == {i for i in large if int(i) < 100} and 20 < len(large) < 60


def test_split_by_tail_and_holdout():
    spec = DataSpec(train="x", split_by="tail", validation_fraction=0.34)
    parts = [dict(sides(spec, d, held_out(spec, d, False))) for d in documents(3)]
    assert [p["train"].text for p in parts] == [f"text number {i}\n" * 2 for i in range(3)]
    assert [p["train"].text + p["validation"].text for p in parts] == [d.text for d in documents(3)]
    spec = DataSpec(train="x", holdout=("1",))
    assert [held_out(spec, d, False) for d in documents(3)] == [False, True, False]
    spec = DataSpec(train="x", validation="y")
    assert [held_out(spec, documents(1)[0], evaluation) for evaluation in (False, True)] == [False, True]


def test_split_by_tail_of_texts_without_line_ends():
    texts = ["one line of several words without any end", "wordwithoutspace" * 4]
    parts = [cut(Document(t, t), 0.25) for t in texts]
    assert [a.text + b.text for a, b in parts] == texts
    assert parts[0][0].text == "one line of several words " and len(parts[1][1].text) == 16
    spec = DataSpec(train="x", split_by="tail", validation_fraction=0.1)
    for text in ("unbroken1\n", "\n\n\n\n\n\n\n\n\nx", "a b", "x"):  # blank on one side: it stays whole
        made = list(sides(spec, Document("d", text), False))
        assert "".join(d.text for _, d in made) == text and all(d.text.strip() for _, d in made)


def test_a_tally_balances_and_keeps_ten_examples():
    tally, other = Tally("short"), Tally("short")

    def stage(document, note):
        if int(document.id) % 3 == 0:
            return Dropped("divisible", document.id)
        note("seen", example=document.id, count=2)
        return Document(document.id, document.text[:4])

    kept = list(apply(stage, documents(60), tally))
    assert len(kept) == 40 and (tally.documents_in, tally.documents_out, tally.characters_out) == (60, 40, 160)
    assert tally.dropped["divisible"][0] == 20 and len(tally.dropped["divisible"][2]) == 10
    assert tally.changed["seen"][:2] == [80, 40]
    list(apply(stage, documents(3), other))
    tally.add(other)
    assert tally.documents_in == 63 and tally.dropped["divisible"][0] == 21 and len(tally.dropped["divisible"][2]) == 10


SPEC, TOKENIZER = {"row_length": 32, "holdout": ("part7",)}, TokenizerSpec(vocab_size=300)


def prepared(corpus, workdir, **changes):
    spec = Preparation(data=DataSpec(train=str(corpus), **(SPEC | changes)), tokenizer=TOKENIZER)
    return prepare(spec, workdir, say=lambda _: None, quiet=True)


def tokens_of(split):
    batches = list(sequential(split, 16))
    real = [b["weights"].reshape(-1) > 0 for b in batches]
    return np.concatenate([b["tokens"].reshape(-1)[r] for b, r in zip(batches, real)])


def test_preparing_twice_gives_the_same_and_no_text_is_lost(corpus, tmp_path):
    first, second = prepared(corpus, tmp_path / "a"), prepared(corpus, tmp_path / "b")
    assert first.fingerprint == second.fingerprint
    for split, names in ((first.validation, ["part7"]), (first.train, [f"part{n}" for n in range(7)])):
        text = first.tokenizer.bytes(tokens_of(split)).decode()
        cleaned = [re.sub(r"\n{3,}", "\n\n", (corpus / f"{n}.txt").read_text()).strip() + "\n" for n in names]
        assert text == "".join("<|endoftext|>" + c for c in cleaned)
        assert split.text_bytes == sum(len(c.encode()) for c in cleaned)
    assert first.report["train"]["tokens"] == len(tokens_of(first.train)) == first.train.tokens
    assert first.report["validation"]["ids"] == ["part7"]


def test_an_interrupted_preparation_leaves_no_data(corpus, tmp_path, monkeypatch):
    from llm.data import finish

    monkeypatch.setattr(finish, "fingerprint", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepared(corpus, tmp_path)
    assert not (tmp_path / "data").exists()
    monkeypatch.undo()
    assert len(prepared(corpus, tmp_path).train) > 100
    assert not (tmp_path / "data.partial").exists()


def test_damaged_data_is_refused(corpus, tmp_path):
    prepared(corpus, tmp_path)
    report = json.loads((tmp_path / "data" / "report.json").read_text())
    assert report["settings"]["tokenizer"]["vocab_size"] == 300
    (shard,) = (tmp_path / "data").glob("*.train.tokens")
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(InputError, match="was changed since it was prepared"):
        open_prepared(tmp_path)
    shard.write_bytes(whole[:-1] + b"x")
    with pytest.raises(InputError, match="was changed since it was prepared"):
        open_prepared(tmp_path)
    shard.unlink()
    with pytest.raises(InputError, match="is damaged"):
        open_prepared(tmp_path)


def test_one_text_in_both_splits(corpus, tmp_path):
    for path in corpus.glob("*.txt"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "part7.txt").write_text((tmp_path / "part2.txt").read_text() + "\n\n")  # equal once cleaned
    found = prepared(tmp_path, tmp_path / "run")
    assert found.report["validation"]["ids"] == ["part7"] and found.report["train"]["documents"] == 6
    spec = Preparation(
        data=DataSpec(train=str(tmp_path / "*.txt"), **SPEC), dedup=DedupSpec(exact=False), tokenizer=TOKENIZER
    )
    with pytest.raises(InputError, match="one text in training and validation"):
        prepare(spec, tmp_path / "run2", say=lambda _: None, quiet=True)


def test_splits_of_many_rows_show_the_objective(corpus, tmp_path):
    found = prepared(corpus, tmp_path, packing="best_fit")
    batch = next(sequential(found.train, 8))
    assert set(batch) == {"tokens", "targets", "weights", "segments", "positions"}
    assert found.report["train"]["filled"] > 0.9


def test_an_account_that_does_not_balance_stops_the_run():
    from llm.data.finish import _check_balance
    from llm.errors import RunFailed

    def report(**wrong):
        stages = [vars(Tally("read", 3, 30, 3, 30)), vars(Tally("clean", 3, 30, 2, 15, {"empty": [1, 10, []]}))]
        stages[1] |= {name: value for name, value in wrong.items() if name in stages[1]}
        split = {"documents": 1, "characters": 7, "text_tokens": 4, "text_tokens_in_shards": wrong.get("tokens", 4)}
        settings = {"data": {"split_by": "hash"}}
        train = {**split, "characters": wrong.get("train", 8)}
        return {"settings": settings, "stages": stages, "train": train, "validation": dict(split)}

    _check_balance(report())
    for wrong in ({"documents_in": 4}, {"characters_in": 29}, {"documents_out": 3}, {"train": 9}, {"tokens": 5}):
        with pytest.raises(RunFailed):
            _check_balance(report(**wrong))


def test_an_evaluation_source_is_cleaned_but_never_filtered(corpus, tmp_path):
    german = "Dies ist ein deutscher Text über das Wetter und die Leute in der Stadt.  \r\n" * 20
    (tmp_path / "german.txt").write_text(german)
    spec = Preparation(
        data=DataSpec(train=str(corpus), validation=str(tmp_path / "german.txt"), row_length=32),
        clean=CleanSpec(languages=("en",), min_characters=3),
        dedup=DedupSpec(document_lines=True, near=True),
        tokenizer=TOKENIZER,
    )
    found = prepare(spec, tmp_path / "run", say=lambda _: None, quiet=True)
    assert found.report["validation"]["documents"] == 1 and found.report["train"]["documents"] == 8
    assert found.report["validation"]["characters"] == len(german.replace("  \r\n", "\n"))


def test_no_more_documents_than_asked_for(corpus, tmp_path):
    limited = prepared(corpus, tmp_path / "a", max_documents=3, holdout=(), split_by="tail")
    assert limited.report["stages"][0]["documents_in"] == 3
    assert limited.report["train"]["ids"] == ["part0", "part1", "part2"]


def test_a_tokenizer_is_trained_on_a_sample(corpus, tmp_path):
    found = []
    for number, sample in enumerate((100_000_000, 20_000)):
        spec = Preparation(
            data=DataSpec(train=str(corpus), **SPEC), tokenizer=TokenizerSpec(vocab_size=600, sample_bytes=sample)
        )
        found.append(prepare(spec, tmp_path / str(number), say=lambda _: None, quiet=True))
    assert found[0].tokenizer.fingerprint != found[1].tokenizer.fingerprint
