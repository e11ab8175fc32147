"""benchmarks.peers on made-up corpora: the very examples that were prepared, and scores that can be counted by hand."""

import json
import subprocess
import sys

import pytest

from benchmarks import peers
from benchmarks.peers import Example
from llm.data import DataSpec, DedupSpec, Preparation, prepare
from llm.data.documents import Document
from llm.errors import InputError
from llm.tokenization import TokenizerSpec
from tests import helpers

FRUIT, METAL = "ripe Apple juice", "heavy Iron ore"


def write(path, records):
    path.write_text("".join(json.dumps({"id": f"{path.stem}{n}", **r}) + "\n" for n, r in enumerate(records)))
    return str(path)


def reviews():
    """Twelve training texts, then what goes: a twin of another label, a twin of a test text. Ten to be held out."""
    train = [{"text": f"{w}, {n}a!", "label": label} for n in range(6) for w, label in ((FRUIT, "f"), (METAL, "m"))]
    train[0]["text"] = f"  {FRUIT}\r\n\r\n\r\n\r\n0a!\u200b"  # is cleaned
    train += [{"text": f"{METAL} 3a", "label": "f"}, {"text": f"{FRUIT} 20B", "label": "f"}]
    test = [{"text": f"{w} {n}b", "label": label} for n in range(20, 25) for w, label in ((FRUIT, "f"), (METAL, "m"))]
    test[2]["label"] = "m"  # a fruit
    return train, test


@pytest.fixture
def prepared(tmp_path):
    """A folder of labelled texts, their sources beside it; the tokenizer lowers case."""
    train, test = reviews()
    data = DataSpec(train=write(tmp_path / "train.jsonl", train), validation=write(tmp_path / "test.jsonl", test),
                    label="label", packing="whole", row_length=32)  # fmt: skip
    tokenizer = TokenizerSpec(kind="wordpiece", lowercase=True, vocab_size=120)
    prepare(Preparation(data=data, tokenizer=tokenizer), tmp_path, say=lambda _: None, quiet=True)
    return tmp_path


def test_the_examples_that_were_prepared_and_their_scores(prepared):
    found = peers.read_prepared(prepared, "classification")
    train, test = reviews()
    want = [Example((r["text"],), r["label"]) for r in train[:12]]
    want[0] = Example((f"{FRUIT}\n\n0a!",), "f")
    assert found == {"train": want, "validation": [Example((r["text"],), r["label"]) for r in test]}
    row = peers.measure(found, "classification")
    assert (row["train"], row["test"]) == (12, 10)
    # 9 of 10; 5 taken for f of which 4 are, 5 for m which has 6: F1 is 8/9 and 10/11.
    right = {"accuracy": 0.9, "macro_f1": round((8 / 9 + 10 / 11) / 2, 4)}
    assert len(row["scores"]) == 4 and all(score == right for score in row["scores"].values())
    shown = peers.table({"made up": row}, "classification")
    assert "\n| made up | 12 | 10 | **0.9000** / 0.8990 | **0.9000** / 0.8990 |" in shown


def test_examples_held_out_by_hash_without_near_twins_and_repeats(tmp_path):
    words = [f"{word}{k}" for k in range(4) for word in "the quick brown fox jumps over a lazy dog today".split()]
    # Four alike, of which one is kept; a line that stands twice.
    texts = [" ".join(f"{word}n{n // 4}" for word in words) + f" {n}" for n in range(200)]
    records = [{"text": f"{text}\n{text}", "label": "fm"[n // 4 % 2]} for n, text in enumerate(texts)]
    data = DataSpec(train=write(tmp_path / "a.jsonl", records), label="label", packing="whole", max_documents=150,
                    validation_fraction=0.2)  # fmt: skip
    dedup = DedupSpec(near=True, threshold=0.6, document_lines=True)
    spec = Preparation(data=data, dedup=dedup, tokenizer=TokenizerSpec(vocab_size=300))
    prepare(spec, tmp_path, say=lambda _: None, quiet=True)
    found = peers.read_prepared(tmp_path, "classification")
    report = json.loads((tmp_path / "data" / "report.json").read_text())
    assert {s: len(found[s]) for s in found} == {s: report[s]["documents"] for s in ("train", "validation")}
    assert sum(map(len, found.values())) == 38 and len(found["validation"]) > 1
    assert {e.text for examples in found.values() for e in examples} <= set(texts)


def test_pairs_of_words_and_characters_are_looked_at():
    orders = {"ab": "alpha beta", "ba": "beta alpha"}
    train = [Example((f"{text} {n}z",), label) for n in range(10) for label, text in orders.items()]
    test = [Example((f"{text} {n}y",), label) for n in range(5) for label, text in orders.items()]
    scores = {name: score["accuracy"] for name, score in peers.classify(train, test).items()}
    assert scores == {
        "SVM, words": 0.5, "naive Bayes, words": 0.5, "SVM, words and pairs": 1, "naive Bayes, words and pairs": 1
    }  # fmt: skip
    chinese = {"good": "东西很好", "bad": "质量很差"}
    train, test = ([Example((f"{a}{text}{b}",), label) for a, b in made for label, text in chinese.items()]
                   for made in (("这我", "他的"), ("你是", "了在")))  # fmt: skip
    scores = peers.classify(train, test)
    assert list(scores) == ["SVM, 1-3 characters", "naive Bayes, 1-3 characters"]
    assert all(score["accuracy"] == 1 for score in scores.values())


PAIRS = {"Open the red files": "Die roten Dateien werden geöffnet", "Save the green page": "Speichert die grüne Seite",
         "Nothing was found": "Es wurde gar nichts gefunden"}  # fmt: skip


@pytest.mark.parametrize("target, score", [
    # 4 of 5 words, 3 of 4 pairs, 2 of 3 triples, 1 of 2 fours are right: BLEU is the fourth root of 1/5.
    ("Die roten Dateien werden gelesen", 66.87),
    (PAIRS["Open the red files"], 100),
])  # fmt: skip
def test_a_translation_memory(tmp_path, target, score):
    data = DataSpec(
        train=write(tmp_path / "train.jsonl", [{"text": k, "target": v} for k, v in PAIRS.items()]),
        validation=write(tmp_path / "test.jsonl", [{"text": "open a red file", "target": target}]),
        fields=("text", "target"), packing="whole", row_length=32,
    )  # fmt: skip
    spec = Preparation(data=data, tokenizer=TokenizerSpec(vocab_size=280))
    prepare(spec, tmp_path, say=lambda _: None, quiet=True)
    row = peers.measure(peers.read_prepared(tmp_path, "translation"), "translation")
    assert (row["train"], row["test"], row["scores"]["bleu"]) == (3, 1, score)
    assert "|tok:13a|" in row["scores"]["signatures"]["bleu"]
    assert (row["scores"]["chrf"] == 100) == (score == 100)
    with pytest.raises(InputError, match=r"--kind=classification: .*labels of two classes or more, there are 0"):
        peers.read_prepared(tmp_path, "classification")


def test_a_translation_finds_its_source_by_what_is_alike():
    train = [Example((source, target)) for source, target in PAIRS.items()]
    told = [Example(("Firefox 3", "Firefox 3 starten")), Example(("Linux", "Unter Linux"))]
    assert peers.retrieve(train + told, told) == {"recall_at_1": 1.0, "mean_reciprocal_rank": 1.0}
    # The second target is most like the first source, the first like its own.
    mixed = [told[0], Example(("Linux", "Firefox 3"))]
    assert peers.retrieve(train + told, mixed) == {"recall_at_1": 0.5, "mean_reciprocal_rank": 0.75}
    # Nothing alike: a tie, which counts against it.
    alien = [Example(("ab", "xy")), Example(("cd", "zw"))]
    assert peers.retrieve(train + told, alien)["mean_reciprocal_rank"] == 0.5


def test_a_name_of_the_text_is_chosen_by_its_place_or_count():
    texts = [("N11 saw N12. N11 left.", "N11 met _.", "N12"), ("N20 and N21. N21 slept. N20", "_ woke.", "N20")]
    asked = [
        Document(str(n), text, {"question": question, "answer": {"text": answer, "start": 0}})
        for n, (text, question, answer) in enumerate(texts)
    ]
    # Of the first text the last and the most frequent name stands in the question; the second has two of each.
    assert peers.choose_names(asked) == {
        "most frequent": 0.5, "last": 0.5, "last, not in the question": 1.0, "guessing": 0.5,
    }  # fmt: skip


def test_of_chinese_characters_are_scored():
    train = [Example(("Open the file", "打开这个文件吧")), Example(("Close it", "关闭"))]
    row = peers.translate(train, [Example(("Open this file", "打开那个文件吧"))])
    assert "|tok:zh|" in row["signatures"]["bleu"]
    # Seven characters, the third wrong: 6/7, 4/6, 2/5, 1/4 are right.
    assert row["bleu"] == round(100 * (6 / 7 * 4 / 6 * 2 / 5 * 1 / 4) ** 0.25, 2)


@pytest.mark.parametrize("place, change, part", [
    ("text", lambda r: r["text"].replace("Iron", "iron ore"), "the text of 'train3' is not the one in its shard"),
    ("label", lambda r: "f", "the label of 'train3' is not the one in its shard"),
    ("text", lambda r: " ", "11 train texts, its shards hold 12"),
])  # fmt: skip
def test_sources_that_have_changed_are_refused(prepared, place, change, part):
    path = prepared / "train.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    records[3][place] = change(records[3])
    write(path, records)
    with pytest.raises(InputError, match=f"{part}: its sources have changed"):
        peers.read_prepared(prepared, "classification")


def test_bad_input_is_one_line(prepared):
    with pytest.raises(InputError, match=r"--kind=translation: .*needs examples of two fields"):
        peers.read_prepared(prepared, "translation")
    with pytest.raises(InputError, match="SVM, words: nothing to learn .* one class"):
        peers.classify([Example(("some words",), "f")], [Example(("some words",), "f")])
    for flags, part in (
        ([f"--prepared={prepared / 'nowhere'}", "--kind=translation"], "there is no such folder"),
        (["--kind=translation"], "give --all alone, or both"),
    ):
        result = subprocess.run([sys.executable, "-m", "benchmarks.peers", *flags], cwd=helpers.ROOT,
                                env=helpers.environment(), capture_output=True, text=True, timeout=120)  # fmt: skip
        helpers.assert_refused(result, part)
