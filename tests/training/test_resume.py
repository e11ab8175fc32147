"""Killed, stopped and refused runs, launched as a user launches them.

Bit-equality here: one CPU device, float32, jitted, same batch shape, dropout on.
"""

import json
import os
import shutil
import signal
import subprocess
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from llm.training.metrics import OF_THE_MACHINE
from tests.helpers import ROOT, assert_refused, assert_refused_last, command, environment, tiny, verb


def start(*arguments) -> subprocess.Popen:
    return subprocess.Popen(
        command("train", *arguments), cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


def rows(workdir):
    path = workdir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for_step(process, workdir, step):
    deadline = time.time() + 120
    while time.time() < deadline and process.poll() is None:
        try:
            if any(row["step"] >= step for row in rows(workdir)):
                return
        except ValueError:  # a row half written
            pass
        time.sleep(0.01)
    raise AssertionError(f"never reached step {step}: {process.communicate()[1]}")


def wait_for_unfinished_save(process, workdir, step):
    """Until the folder of a checkpoint stands without its manifest."""
    place = workdir / "checkpoints" / str(step)
    while process.poll() is None:
        if place.is_dir():
            return
        time.sleep(0.001)
    raise AssertionError(process.communicate()[1])


def arrays(workdir, step):
    state = ocp.StandardCheckpointer().restore(workdir / "checkpoints" / str(step) / "state")
    return jax.tree.map(
        lambda x: jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x, state
    )


def assert_same_run(workdir, other):
    a, b = arrays(workdir, 24), arrays(other, 24)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
    for x, y in zip(rows(workdir), rows(other)):
        assert {name: x[name] for name in x.keys() - set(OF_THE_MACHINE)} == {
            name: y[name] for name in y.keys() - set(OF_THE_MACHINE)
        }
    assert len(rows(workdir)) == len(rows(other))
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (workdir, other)]
    for name in ("validation", "samples", "train_tokens", "parameters", "steps"):
        assert summaries[0][name] == summaries[1][name], name


@pytest.mark.slow  # tests/training/test_kills.py has twenty kills at any moment; here one falls into a save for certain
def test_killed_again_and_again_it_ends_bit_equal(finished_run, corpus, tmp_path, monkeypatch):
    """SIGKILL in preparation, compilation and while saving, of processes that each compile for themselves; each time
    the same command goes on. `test_kills` has random moments of steps and saves.
    """
    workdir = tmp_path / "killed"
    arguments = tiny(corpus, workdir)
    # As a user's processes do, each compiles for itself: no cache of compiled programs makes them equal.
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    for seconds in (2.0, 3.5):  # imports and preparation; compilation
        process = start(*arguments)
        time.sleep(seconds)
        process.kill()
        process.communicate()
    process = start(*arguments)
    wait_for_unfinished_save(process, workdir, 20)
    process.kill()
    process.communicate()
    result = verb("train", *arguments)
    assert result.returncode == 0, result.stderr
    assert "resuming at step" in result.stdout
    assert_same_run(workdir, finished_run)
    assert [row["step"] for row in rows(workdir)] == list(range(2, 25, 2))


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
def test_a_stop_signal_saves_and_exits_75(finished_run, corpus, tmp_path, number):
    workdir = tmp_path / "stopped"
    process = start(*tiny(corpus, workdir))
    wait_for_step(process, workdir, 6)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 75, stderr
    assert "Traceback" not in stderr and "the same command goes on" in stderr.splitlines()[-1]
    saved = max(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
    assert saved >= 6
    result = verb("train", *tiny(corpus, workdir))
    assert result.returncode == 0 and f"resuming at step {saved}" in result.stdout, result.stderr
    assert_same_run(workdir, finished_run)


def test_a_finished_run_says_so_and_changes_nothing(finished_run, corpus):
    before = {p: p.stat().st_mtime_ns for p in finished_run.rglob("*") if p.is_file()}
    arguments = [
        a.replace("--workdir=", f"--workdir={finished_run}") if a == "--workdir=" else a
        for a in tiny(corpus, finished_run)
    ]
    result = verb("train", *arguments)
    assert result.returncode == 0 and "is finished" in result.stdout and "bits per byte" in result.stdout
    assert before == {p: p.stat().st_mtime_ns for p in finished_run.rglob("*") if p.is_file()}


def test_a_workdir_of_another_config_is_refused(finished_run, corpus):
    before = sorted(p for p in finished_run.rglob("*"))
    result = verb("train", *tiny(corpus, finished_run, "optimizer.learning_rate=0.5", "model.layers=3"))
    assert_refused(result, "optimizer.learning_rate: 0.001 -> 0.5", "model.layers: 2 -> 3", str(finished_run))
    assert before == sorted(p for p in finished_run.rglob("*"))


@pytest.fixture
def partly(finished_run, tmp_path):
    """A copy of the finished run that has only step 20, without its end."""
    workdir = tmp_path / "partly"
    shutil.copytree(finished_run, workdir)
    (workdir / "summary.json").unlink()
    shutil.rmtree(workdir / "checkpoints" / "24")
    assert (workdir / "checkpoints" / "20").is_dir()
    return workdir


def test_killed_between_the_last_checkpoint_and_the_summary(finished_run, corpus, tmp_path):
    workdir = tmp_path / "ended"
    shutil.copytree(finished_run, workdir)
    (workdir / "summary.json").unlink()
    result = verb("train", *tiny(corpus, workdir))
    assert result.returncode == 0 and "resuming at step 24 of 24" in result.stdout, result.stderr
    assert_same_run(workdir, finished_run)


def test_half_written_checkpoints_are_skipped_by_name_and_kept(partly, finished_run, corpus):
    good = partly / "checkpoints" / "20"
    damaged = {
        21: "no manifest.json", 22: "bytes instead of", 23: "is missing", 24: "checksum", 25: "no manifest.json",
        26: "manifest.json is damaged", 28: "manifest.json is damaged",
    }  # fmt: skip
    for step in damaged:
        shutil.copytree(good, good.with_name(str(step)))

    def largest(step):
        return max((p for p in good.with_name(str(step)).rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)

    (good.with_name("21") / "manifest.json").unlink()
    os.truncate(largest(22), largest(22).stat().st_size // 2)
    largest(23).unlink()
    data = bytearray(largest(24).read_bytes())
    data[len(data) // 2] ^= 1
    largest(24).write_bytes(data)
    shutil.rmtree(good.with_name("25"))
    (good.with_name("25") / "state").mkdir(parents=True)
    (good.with_name("26") / "manifest.json").write_text("{")
    (good.with_name("28") / "manifest.json").write_text("null")
    (good.with_name("27.orbax-checkpoint-tmp-0")).mkdir()

    result = verb("train", *tiny(corpus, partly))
    assert result.returncode == 0, result.stderr
    for step, reason in damaged.items():
        assert any(f"checkpoint {step} is skipped" in line and reason in line for line in result.stdout.splitlines())
    assert "checkpoint 27.orbax-checkpoint-tmp-0 is skipped" in result.stdout
    assert "resuming at step 20" in result.stdout
    assert "checkpoint 24 was incomplete and now stands as 24.incomplete-1" in result.stdout
    names = {p.name for p in (partly / "checkpoints").iterdir()}
    assert {"21", "22", "23", "24", "24.incomplete-1", "25", "26", "27.orbax-checkpoint-tmp-0"} <= names
    assert_same_run(partly, finished_run)


def test_other_data_under_a_checkpoint_is_refused(partly, corpus):
    from llm.data import finish
    from llm.tokenization import Tokenizer

    report = json.loads((partly / "data" / "report.json").read_text())
    (shard,) = (partly / "data").glob("*.train.tokens")
    data = bytearray(shard.read_bytes())
    data[-2] ^= 1
    shard.write_bytes(data)
    assert_refused(verb("train", *tiny(corpus, partly)), "was changed since it was prepared")
    # A folder prepared anew from other text is whole in itself; the checkpoint knows better.
    report["files"][shard.name] = finish.digest(shard)
    report["fingerprint"] = finish.fingerprint(report["files"], Tokenizer.load(partly / "tokenizer.json"))
    (partly / "data" / "report.json").write_text(json.dumps(report))
    assert_refused_last(verb("train", *tiny(corpus, partly)), "checkpoint 20 was trained on other data")


def test_steps_without_a_finite_gradient_stop_the_run_with_a_diagnostic(corpus, tmp_path):
    """A learning rate of 1e30 makes every step after the first overflow."""
    workdir = tmp_path / "diverged"
    arguments = tiny(
        corpus, workdir, "optimizer.learning_rate=1e30", "optimizer.warmup_steps=0", "training.max_skipped=3",
        "training.checkpoint_every=1", "training.keep_checkpoints=5",
    )  # fmt: skip
    result = verb("train", *arguments)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "3 steps in a row had no finite gradient" in result.stderr.splitlines()[-1]
    assert "step 2 is skipped" in result.stderr and "--debug-nans" in result.stderr.splitlines()[-1]
    kept = workdir / "diagnostics"
    assert {path.name for path in kept.iterdir()} == {"2.npz", "4.npz", "4"}  # the first of a row, and the last
    assert set(np.load(kept / "4.npz")) >= {"step", "tokens", "targets", "metrics.loss"}
    # Steps 2 to 4 changed nothing, so that the state kept has what step 1 left.
    places = kept / "4", workdir / "checkpoints" / "1"
    states = [ocp.StandardCheckpointer().restore(place / "state") for place in places]
    for part in ("params", "opt_state"):
        for x, y in zip(jax.tree.leaves(states[0][part]), jax.tree.leaves(states[1][part])):
            np.testing.assert_array_equal(x, y)

    result = verb("train", *arguments, "--debug-nans")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1].startswith("first: ")
    for line in (
        f"step 4: loss {float(np.load(kept / '4.npz')['metrics.loss'])}, norm of the gradient nan",
        "its batch, dropout and parameters are exactly that step's",
        "batch: finite",
        "parameter: finite",
    ):
        assert line in result.stdout.splitlines()
