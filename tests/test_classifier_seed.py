"""The worked program, launched as a user does."""

import json
import subprocess
import sys

import numpy as np
import pytest

from experiments.classifier import seed
from llm import models
from llm.errors import RunFailed
from tests.helpers import ROOT, assert_refused, environment


def launch(*arguments):
    command = [sys.executable, "-m", "experiments.classifier.seed", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)


@pytest.mark.long
def test_it_learns_its_texts_by_heart_and_gives_probabilities(tmp_path):
    (tmp_path / "probabilities.npy").write_text("an earlier run's")
    result = launch("--smoke", f"--workdir={tmp_path}", "--seed=3")
    assert result.returncode == 0, result.stderr
    assert "training" in result.stderr and "probabilities of the 10 classes for 10 new texts, (10, 10)" in result.stdout

    found = np.load(tmp_path / "probabilities.npy")
    assert found.shape == (10, 10) and found.dtype == np.float32
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-6)
    assert found.min() >= 0 and len(np.unique(found, axis=0)) == 10

    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == list(range(1, len(rows) + 1)) and len(rows) >= 10
    assert [row["step"] for row in rows] == [4 * row["epoch"] for row in rows]  # 32 texts, 8 a batch
    for row in rows:
        assert f"epoch {row['epoch']:2}   loss {row['loss']:.3f}" in result.stdout
    last = rows[-1]
    assert last["right_after"] == 32 and last["loss_after"] < 0.5 < np.log(10) - 1 < rows[0]["loss"]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.partial"))


def test_the_texts_are_the_programs():
    data = seed.examples(seed.WORKED_PROGRAM, 32, np.random.default_rng(0))
    tokens, labels = data["tokens"], data["labels"]
    assert tokens.shape == (32, 100) and labels.shape == (32,)
    assert tokens.min() >= 0 and 900 < tokens.max() < 1000  # all ids, none outside the table
    assert set(labels.tolist()) <= set(range(10)) and len(set(labels.tolist())) > 5
    other = seed.examples(seed.WORKED_PROGRAM, 32, np.random.default_rng(1))
    assert (other["tokens"] != tokens).mean() > 0.9


@pytest.mark.long
def test_texts_that_are_never_learned_fail_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(seed, "MOST_EPOCHS", 1)
    data = seed.examples(seed.SMOKE, 32, np.random.default_rng(0))
    with pytest.raises(RunFailed, match="of 32 texts are still wrong after epoch 1, the last one"):
        seed.learn(models.build(seed.SMOKE), data, seed.SMOKE_RATE, 3, tmp_path)  # compiled by the test above
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    "flag, part",
    [
        ("--sede=1", "--sede=1"),
        ("--seed=first", "invalid int value: 'first'"),
        ("--seed=-1", "--seed=-1 must lie in 0..4294967295"),
        ("--workdir=README.md", "--workdir=README.md is a file"),
    ],
)
def test_a_bad_flag_is_one_line(flag, part):
    assert_refused(launch("--smoke", flag), part)
