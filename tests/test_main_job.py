"""The main job and the verbs on what it leaves, launched as a user launches them."""

import json
import math

import numpy as np
import pytest

from llm import config
from tests.helpers import ROOT, verb


def test_a_runs_folder_holds_what_the_readme_says(finished_run):
    names = {p.name for p in finished_run.iterdir()}
    assert names == {
        "config.json", "tokenizer.json", "data", "checkpoints", "metrics.jsonl", "tensorboard", "summary.json",
        "curves.png", "validation.jsonl",
    }  # fmt: skip
    assert (finished_run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((finished_run / "tensorboard").glob("events*"))
    assert sorted(p.name for p in (finished_run / "checkpoints").iterdir()) == ["20", "24"]
    experiment = config.read(finished_run / "config.json")
    assert experiment.training.steps == 24 and experiment.data.holdout == ("part7",)


def test_metrics_and_summary(finished_run):
    rows = [json.loads(line) for line in (finished_run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(2, 25, 2))
    assert {"loss", "grad_norm", "learning_rate", "tokens_per_second"} <= set(rows[0])
    assert [row["step"] for row in rows if "validation.loss" in row] == [10, 20]
    assert rows[-1]["loss"] < rows[0]["loss"]
    summary = json.loads((finished_run / "summary.json").read_text())
    validation = summary["validation"]
    report = json.loads((finished_run / "data" / "report.json").read_text())
    assert validation["tokens"] == report["validation"]["tokens"]
    assert validation["bytes"] == report["validation"]["bytes"]
    bits = validation["loss"] * validation["tokens"] / math.log(2) / validation["bytes"]
    np.testing.assert_allclose(validation["bits_per_byte"], bits, rtol=1e-9)
    np.testing.assert_allclose(validation["perplexity"], math.exp(validation["loss"]), rtol=1e-9)
    assert summary["steps"] == 24 and summary["skipped_steps"] == 0 and 0 < summary["mfu"] < 1.5
    assert 24 * 4 * 32 - 32 < summary["train_tokens"] <= 24 * 4 * 32
    assert [s["prompt"] for s in summary["samples"]] == ["She was", "He"]


def test_tensorboard_events_hold_the_logged_numbers(finished_run):
    from tensorboardX.proto.event_pb2 import Event

    (path,) = (finished_run / "tensorboard").iterdir()
    data, at, found = path.read_bytes(), 0, {}
    while at < len(data):  # a record: length, its checksum, the event, its checksum
        length = int.from_bytes(data[at : at + 8], "little")
        event = Event.FromString(data[at + 12 : at + 12 + length])
        found |= {(event.step, value.tag): value.simple_value for value in event.summary.value}
        at += length + 16
    rows = [json.loads(line) for line in (finished_run / "metrics.jsonl").read_text().splitlines()]
    assert {key for key in found if key[1] == "loss"} == {(row["step"], "loss") for row in rows}
    np.testing.assert_allclose([found[row["step"], "loss"] for row in rows], [row["loss"] for row in rows], rtol=1e-6)


def scores(finished_run, batch_size):
    result = verb("evaluate", f"--workdir={finished_run}", f"--batch-size={batch_size}")
    assert result.returncode == 0, result.stderr
    evaluation = json.loads((finished_run / "evaluation.json").read_text())
    (finished_run / "evaluation.json").unlink()
    assert f"{evaluation['validation']['bits_per_byte']:.5f}" in result.stdout
    low, high = evaluation["validation"]["perplexity_interval"]
    assert f"({low:.3f} to {high:.3f})" in result.stdout
    return evaluation["validation"]


def test_evaluation_is_the_same_for_any_batch_size(finished_run):
    summary = json.loads((finished_run / "summary.json").read_text())["validation"]
    records = [json.loads(line) for line in (finished_run / "validation.jsonl").read_text().splitlines()]
    for batch_size in (1, 7, 500):
        found = scores(finished_run, batch_size)
        assert found["tokens"] == summary["tokens"]
        np.testing.assert_allclose(found["loss"], summary["loss"], rtol=1e-6)
        np.testing.assert_allclose(found["bits_per_byte"], summary["bits_per_byte"], rtol=1e-6)
        # A row has a line, in order; the rows that fill up a batch have none.
        again = [json.loads(line) for line in (finished_run / "validation.jsonl").read_text().splitlines()]
        assert [(r["example"], r["tokens"]) for r in again] == [(n, r["tokens"]) for n, r in enumerate(records)]
        np.testing.assert_allclose([r["loss"] for r in again], [r["loss"] for r in records], atol=2e-5)
        assert sum(r["tokens"] for r in again) == summary["tokens"]


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(["--temperature=0"], marks=pytest.mark.long),
        ["--temperature=0.9", "--top-k=20", "--top-p=0.9", "--seed=3"],
    ],
)
def test_generation_with_and_without_the_cache(finished_run, flags):
    how = [f"--workdir={finished_run}", "--prompt=Catherine", "--max-tokens=38", *flags]
    cached, again, whole = (verb("generate", *how, *more) for more in ([], [], ["--no-cache"]))
    assert cached.returncode == whole.returncode == 0, cached.stderr + whole.stderr
    assert cached.stdout.startswith("Catherine") and len(cached.stdout) > 20
    assert cached.stdout == again.stdout == whole.stdout


def test_quickstart_smoke_on_the_embedded_corpus(tmp_path):
    """The main job's path: prepared by llm.prepare first, taken up by llm.train, more than one CPU device."""
    flags = ["--config=experiments/quickstart.py:smoke", f"--workdir={tmp_path / 'run'}"]
    prepared = verb("prepare", *flags)
    assert prepared.returncode == 0 and "5 training, 1 validation" in prepared.stdout, prepared.stderr
    result = verb("train", *flags, "--config.mesh.cpu_devices=2")
    assert result.returncode == 0, result.stderr
    assert "prepared before" in result.stdout and "bits per byte" in result.stdout
    assert result.stdout.count("continues:") == 3
    assert result.stderr.count("attention: auto is blockwise") == 1
    assert "training: 100%" in result.stderr and "tokens/s" in result.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["validation"]["bytes"] > 466_000 and summary["validation"]["bits_per_byte"] < 5


def test_show_parameters_trains_nothing():
    result = verb("train", "--config=tests/tiny.py", "--show-parameters")
    assert result.returncode == 0, result.stderr
    row = next(line.split() for line in result.stdout.splitlines() if line.startswith("stack/layers/mlp/down/kernel"))
    assert row[1:5] == ["2x128x32", "mlp", "1", "yes"]
    rule = next(line.split() for line in result.stdout.splitlines() if line.startswith("vocab "))
    assert rule == ["vocab", "tensor", "embed/table"]


def test_a_users_own_folder_from_text_to_model(corpus, tmp_path):
    """Prepare a folder by hash, then train on it with settings of its own."""
    flags = ["--config=tests/tiny.py:smoke", f"--workdir={tmp_path}", f"--config.data.train={corpus}"]
    own = [*flags, "--config.data.holdout=()", "--config.data.validation_fraction=0.3"]
    for name in ("prepare", "train"):
        result = verb(name, *own)
        assert result.returncode == 0, result.stderr
    assert (ROOT / "tests" / "tiny.py").is_file() and (tmp_path / "summary.json").is_file()


@pytest.mark.long
def test_the_readmes_experiment_of_your_own(corpus, tmp_path):
    """The ten lines of the README, with the corpus of the tests in place of my/texts."""
    blocks = (ROOT / "README.md").read_text(encoding="utf-8").split("```python\n")[1:]
    (code,) = [block.split("```")[0] for block in blocks if "def get_config" in block]
    assert len([line for line in code.splitlines() if line.strip()]) <= 10 and '"my/texts"' in code
    path = tmp_path / "mine.py"
    path.write_text(code.replace('"my/texts"', repr(str(corpus))))
    flags = [f"--config={path}:smoke", f"--workdir={tmp_path / 'run'}", "--config.model.layers=2"]
    result = verb("train", *flags, "--config.tokenizer.vocab_size=400")
    assert result.returncode == 0 and "bits per byte" in result.stdout, result.stderr


def test_libtpu_is_quiet_where_there_is_no_tpu(finished_run):
    """The tests install libtpu into the user's environment; without a word it would fill the first lines of stderr."""
    how = [f"--workdir={finished_run}", "--prompt=The ", "--max-tokens=2"]
    result = verb("generate", *how, JAX_PLATFORMS="")
    assert result.returncode == 0, result.stderr
    assert "libtpu" not in result.stderr and "host bounds" not in result.stderr, result.stderr
