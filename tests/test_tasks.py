"""Every family and objective from text to scores, launched as a user launches them, and what they refuse."""

import json
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest

from llm import config
from llm.data import DataSpec
from llm.data.documents import Document
from llm.data.split import held_out
from llm.errors import InputError
from tests.helpers import ROOT, assert_refused, assert_refused_last, command, environment, verb

NUMBERS = "one two three four five six seven eight nine ten eleven twelve".split()
COLOURS = "red green blue yellow black white orange purple brown grey pink violet".split()


def example(n: int) -> dict:
    """A text of numbers or one of colours, with whatever a task may ask for."""
    rng = np.random.default_rng(n)
    words = (NUMBERS, COLOURS)[n % 2]
    text = [words[i] for i in rng.integers(0, len(words), 8)]
    place = len(" ".join(text[:3])) + 1
    return {
        "id": str(n),
        "text": " ".join(text),
        "label": ("numbers", "colours")[n % 2],
        "target": " ".join(reversed(text[:3])),
        "question": "which is the fourth ?",
        "answer": {"text": text[3], "start": place},
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "examples.jsonl"
    path.write_text("".join(json.dumps(example(n)) + "\n" for n in range(80)), encoding="utf-8")
    return path


def flags(variant, data, workdir, *overrides):
    settings = [f"--config.{o}" for o in overrides]
    return [f"--config=tests/tasks.py:{variant}", f"--workdir={workdir}", f"--config.data.train={data}", *settings]


def run(variant, data, workdir, *overrides) -> tuple[dict, str]:
    result = verb("train", *flags(variant, data, workdir, *overrides))
    assert result.returncode == 0, result.stderr
    return json.loads((workdir / "summary.json").read_text()), result.stdout


def records(workdir):
    return [json.loads(line) for line in (workdir / "validation.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def pretrained(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained") / "run"
    return folder, *run("pretrain", data, folder)


@pytest.fixture(scope="module")
def fine_tuned(pretrained, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fine-tuned") / "run"
    start = (f"training.start_from={pretrained[0]}", f"tokenizer.path={pretrained[0]}/tokenizer.json")
    return folder, *run("fine_tune", data, folder, *start)


def test_pre_training_reports_both_losses(pretrained):
    folder, summary, printed = pretrained
    assert summary["objective"] == "masked" and "bits_per_byte" not in summary["validation"]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {"loss", "next_sentence", "next_sentence_accuracy"} <= set(rows[-1])
    assert any("validation.loss" in row for row in rows)
    found, numbers = records(folder), summary["validation"]
    assert sum(record["tokens"] for record in found) == numbers["tokens"]
    mean = sum(record["loss"] * record["tokens"] for record in found) / numbers["tokens"]
    np.testing.assert_allclose(mean, numbers["loss"], rtol=1e-5)
    low, high = numbers["perplexity_interval"]
    assert low < numbers["perplexity"] < high and f"({low:.3f} to {high:.3f})" in printed
    assert "perplexity" in printed and "bits per byte" not in printed


def test_fine_tuning_starts_from_the_encoder_and_learns_the_classes(pretrained, fine_tuned):
    folder, summary, printed = fine_tuned
    assert f"starting from {pretrained[0]}, step 12" in printed
    assert "new are class_head/output/bias, class_head/output/kernel" in printed
    assert "not taken are its mask_head/" in printed
    scores = summary["validation"]
    assert scores["accuracy"] > 0.9 and scores["examples"] == len(records(folder))
    assert (folder / "confusion.png").stat().st_size > 1000 and (folder / "curves.png").stat().st_size > 1000
    for record in records(folder):
        assert record["label"] in ("numbers", "colours")
        assert abs(np.exp(record["log_probabilities"]).sum() - 1) < 1e-3
    right = np.mean([record["label"] == record["prediction"] for record in records(folder)])
    assert abs(right - scores["accuracy"]) < 1e-9


def test_scores_do_not_depend_on_the_batch_size_and_an_ensemble_of_one_model_is_the_model(fine_tuned):
    folder, summary, _ = fine_tuned
    before = records(folder)
    result = verb("evaluate", f"--workdir={folder}", "--batch-size=3")
    assert result.returncode == 0, result.stderr
    again = json.loads((folder / "evaluation.json").read_text())["validation"]
    assert again["confusion"] == summary["validation"]["confusion"]
    np.testing.assert_allclose(again["loss"], summary["validation"]["loss"], rtol=1e-5)
    for a, b in zip(before, records(folder), strict=True):
        np.testing.assert_allclose(a["log_probabilities"], b["log_probabilities"], atol=2e-5)
    result = verb("evaluate", f"--workdir={folder}", f"--ensemble={folder},{folder}", f"--ensemble={folder}")
    assert result.returncode == 0 and "runs averaged  4" in result.stdout, (result.stdout, result.stderr)
    both = json.loads((folder / "ensemble.json").read_text())["validation"]
    np.testing.assert_allclose(both["loss"], again["loss"], rtol=1e-5)


def test_a_start_that_does_not_fit_is_refused(pretrained, fine_tuned, data, tmp_path):
    start = f"training.start_from={pretrained[0]}"
    assert_refused_last(
        verb("train", *flags("fine_tune", data, tmp_path / "a", start, "tokenizer.lowercase=true")),
        "tokenizer is another one",
    )
    path = f"tokenizer.path={pretrained[0]}/tokenizer.json"
    wide = verb("train", *flags("fine_tune", data, tmp_path / "b", start, path, "model.width=32"))
    assert_refused_last(wide, "has shape", "give the model the same settings")
    assert not (tmp_path / "b" / "config.json").exists()  # the folder is free for the right settings
    cut = shutil.copytree(pretrained[0], tmp_path / "cut", ignore=shutil.ignore_patterns("checkpoints"))
    cut_off = verb("train", *flags("fine_tune", data, tmp_path / "d", f"training.start_from={cut}", path))
    assert_refused(cut_off, "cut holds no complete checkpoint")
    nowhere = verb("train", *flags("fine_tune", data, tmp_path / "c", "training.start_from=nowhere"))
    assert_refused(nowhere, "training.start_from=nowhere: there is no such folder")


@pytest.mark.parametrize("variant", ["rnn", pytest.param("classifier", marks=pytest.mark.long)])
def test_classifiers_learn(variant, data, tmp_path):
    # Of the shortest pieces of words, texts have unlike lengths: one program for each of two, and none besides.
    buckets = {"rnn": ("data.buckets=20,32", "tokenizer.vocab_size=50")}.get(variant, ())
    summary, printed = run(variant, data, tmp_path, *buckets)
    assert summary["validation"]["accuracy"] > 0.9 and "accuracy" in printed
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert (last["compiles"], last["surplus_compiles"]) == (1 + bool(buckets), 0)


@pytest.mark.long
def test_answers_and_pairs_are_learned_from_a_pre_trained_encoder_and_scored(pretrained, data, tmp_path):
    start = (f"training.start_from={pretrained[0]}", f"tokenizer.path={pretrained[0]}/tokenizer.json")
    summary, printed = run("answers", data, tmp_path / "answers", *start)
    assert f"starting from {pretrained[0]}, step 12" in printed and "new are span" in printed
    assert {"exact_match", "f1", "loss"} <= set(summary["validation"]) and "exact match" in printed
    found = records(tmp_path / "answers")
    assert len(found) == summary["validation"]["examples"]
    # The right answers, as the tokenizer writes them, are those of the data.
    rights = {example(n)["answer"]["text"] for n in range(80)}
    assert {record["answer"] for record in found} <= rights
    summary, printed = run("pairs", data, tmp_path / "pairs", *start)
    assert f"starting from {pretrained[0]}, step 12" in printed
    assert summary["validation"]["recall_at_1"] <= summary["validation"]["recall_at_20"] == 1.0
    assert "recall at 1" in printed


@pytest.mark.long
def test_translations_are_written_scored_and_asked_for(data, tmp_path):
    summary, printed = run("translate", data, tmp_path)
    assert {"bleu", "chrf", "exact_match", "bleu_signature", "perplexity"} <= set(summary["validation"])
    assert "tok:13a" in printed and len(summary["samples"]) == 1
    found = records(tmp_path)
    by_source = {example(n)["text"]: example(n)["target"] for n in range(80)}
    assert found and all(by_source[record["source"]] == record["reference"] for record in found)
    result = verb("generate", f"--workdir={tmp_path}", "--prompt=one two", "--max-tokens=5", "--temperature=0")
    assert result.returncode == 0 and not result.stdout.startswith("one two"), result.stderr
    asked, answered = tmp_path / "asked.jsonl", tmp_path / "answered.jsonl"
    asked.write_text('{"prompt": "one two three", "id": 1}\n{"prompt": "red"}\n')
    files = [f"--prompts={asked}", f"--output={answered}"]
    result = verb("generate", f"--workdir={tmp_path}", *files, "--beams=3", "--max-tokens=6", "--batch-size=4")
    assert result.returncode == 0, result.stderr
    answers = [json.loads(line) for line in answered.read_text().splitlines()]
    assert [answer["prompt"] for answer in answers] == ["one two three", "red"] and answers[0]["id"] == 1
    assert all(answer["score"] < 0 and isinstance(answer["completion"], str) for answer in answers)
    chat = verb("generate", f"--workdir={tmp_path}", "--chat")
    assert_refused(chat, "--chat needs a model that continues a text; this one reads a source")


@pytest.mark.long
def test_a_stopped_stream_goes_on_with_its_state(data, tmp_path):
    """The carried state is in the checkpoint: the run equals one that was never stopped, bit for bit (one device)."""
    whole, _ = run("stream", data, tmp_path / "whole", "training.steps=40", "training.checkpoint_every=5")
    again = flags("stream", data, tmp_path / "again", "training.steps=40", "training.checkpoint_every=5")
    process = subprocess.Popen(command("train", *again), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    place = tmp_path / "again" / "checkpoints" / "5"
    deadline = time.time() + 120
    while not place.is_dir() and process.poll() is None and time.time() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 75, process.communicate()[1]
    result = verb("train", *again)
    assert result.returncode == 0 and "resuming at step" in result.stdout, result.stderr
    resumed = json.loads((tmp_path / "again" / "summary.json").read_text())
    assert resumed["validation"] == whole["validation"] and resumed["samples"] == whole["samples"]
    assert whole["validation"]["bits_per_byte"] > 0


REFUSALS = [
    ("fine_tune", ["objective.kind=causal"], ["the bert family learns masked, classification"]),
    ("stream", ["objective.stream=false"], ["model.carry=True", "set objective.stream=True"]),
    ("stream", ["training.microbatches=2"], ["training.microbatches=2", "model.carry=True"]),
    ("stream", ["model.carry=false", "model.bidirectional=true"], ["model.bidirectional=True", "set it to False"]),
    ("pairs", ["training.microbatches=2"], ["compares all rows"]),
    ("pairs", ["training.z_loss=1e-4"], ["training.z_loss=0.0001", "set 0"]),
    ("pairs", ["training.label_smoothing=0.1"], ["training.label_smoothing=0.1", "set 0"]),
    ("answers", ["training.label_smoothing=0.1"], ["training.label_smoothing=0.1", "set 0"]),
    ("fine_tune", ["model.heads=3"], ["model.heads=3 does not divide model.width=16"]),
    ("fine_tune", ["model.context=16"], ["data.row_length=32 is longer than model.context=16"]),
    ("fine_tune", ["model.bag_pairs=8"], ["pairs need a bag above 0"]),
    ("fine_tune", ["model.poolin=mean"], ["model has no field 'poolin'", "'pooling' (nearest)"]),
    ("fine_tune", ["model.pooling=median"], ["model.pooling='median'", "mean"]),
    ("fine_tune", ["generation.prompts=x"], ["writes nothing"]),
    ("translate", ["model.position=learned"], ["learned positions need a context"]),
    ("t5", ["model.buckets=5"], ["model.buckets=5"]),
    ("translate", ["optimizer.warmup_steps=0"], ["optimizer.warmup_steps must be at least 1"]),
    ("classifier", ["model.heads=3"], ["model.heads=3 does not divide model.width=16"]),
    ("translate", ["model.heads=3"], ["model.heads=3 does not divide model.width=16"]),
    ("t5", ["model.heads=3"], ["model.heads=3 does not divide model.width=16; set model.head_width"]),
    ("classifier", ["model.context=16"], ["data.row_length=32 is longer than model.context=16"]),
    (
        "translate",
        ["model.position=learned", "model.context=16"],
        ["data.row_length=64 is longer than model.context=16"],
    ),
    (
        "tests/tiny.py",
        ["model.position=learned", "data.row_length=99"],
        ["data.row_length=99 is longer than model.context="],
    ),
    ("answers", ["model.types=1"], ["model.types=1: data.fields=('question', 'text') needs 2"]),
    ("experiments/published.py:bert/bse", [], ["unknown preset 'bse' of bert; there are 'base' (nearest)"]),
    ("experiments/published.py:encdec/bigger", [], ["unknown preset 'bigger' of encdec; there are 'big' (nearest)"]),
]


def test_settings_that_do_not_fit_are_refused_before_anything_is_read(tmp_path):
    for variant, overrides, parts in REFUSALS:
        with pytest.raises(InputError) as refused:
            loaded = config.load(variant if "/" in variant else f"tests/tasks.py:{variant}")
            config.resolve(config.override(loaded, [tuple(o.split("=", 1)) for o in overrides]))
        for part in parts:
            assert part in str(refused.value), (variant, overrides, str(refused.value))


def test_a_refusal_is_one_line(data, tmp_path):
    assert_refused(verb("train", *flags("fine_tune", data, tmp_path, "model.heads=3")), "model.heads=3")


def test_fewer_classes_than_the_data_and_classes_without_examples_are_refused(tmp_path, data):
    few = verb("train", *flags("classifier", data, tmp_path / "few", "model.classes=1"))
    assert_refused_last(few, "model.classes=1: the data's labels name 2")
    # One text of a third class, and it is held out.
    spec = DataSpec(validation_fraction=0.3)
    texts = (f"lonely word{number}" for number in range(100))
    text = next(t for t in texts if held_out(spec, Document(id="lonely", text=t), evaluation=False))
    lonely = json.dumps({"id": "lonely", "text": text, "label": "lonely"})
    path = tmp_path / "lonely.jsonl"
    path.write_text(data.read_text(encoding="utf-8") + lonely + "\n", encoding="utf-8")
    result = verb("train", *flags("classifier", path, tmp_path / "lonely"))
    assert_refused_last(result, "no training example is left with the label 'lonely'")


def test_an_unknown_preset_names_the_nearest(tmp_path):
    path = tmp_path / "wrong.py"
    path.write_text(
        'from llm.config import default_config\ndef get_config(v=""):\n    return default_config("gpt", "gpt2-xxl")\n'
    )
    result = verb("train", f"--config={path}", f"--workdir={tmp_path / 'run'}")
    assert_refused(result, "unknown preset 'gpt2-xxl' of gpt", "'gpt2-xl' (nearest)")
