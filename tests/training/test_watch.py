"""What a run says of itself: one run with a late batch, a short one and one of NaN, watched by all there is."""

import json
import re
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from llm.errors import InputError
from llm.training import metrics, watch
from tests.helpers import ROOT, assert_refused_last, environment, tiny, verb
from tests.training.test_resume import rows

# Records how it is called, as JSON lines in its folder.
WANDB = """
import json, pathlib

def _record(*call):
    with (pathlib.Path(__file__).parent / "calls.jsonl").open("a") as file:
        file.write(json.dumps(call) + "\\n")

class Run:
    def log(self, numbers, step):
        _record("log", step, numbers)

    def finish(self, exit_code):
        _record("finish", exit_code)

def init(**settings):
    _record("init", settings)
    return Run()
"""
NAN, SHORT, LATE = 6, 8, 12
SAVED, STEPS = 5, 16


def started(folder, faults, arguments):
    """A run with faults; its stderr goes to a file."""
    with (folder / "stderr.txt").open("w") as stderr, (folder / "stdout.txt").open("w") as stdout:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.training.faulty", json.dumps(faults), *arguments],
            cwd=ROOT, env=environment(PYTHONPATH=str(folder / "modules")), stdout=stdout, stderr=stderr,
        )  # fmt: skip


@pytest.fixture(scope="module")
def watched(tmp_path_factory, corpus):
    """(folder, workdir, arguments): the late batch came only after the run had said that it hangs."""
    folder = tmp_path_factory.mktemp("watched")
    (folder / "modules").mkdir()
    (folder / "modules" / "wandb.py").write_text(WANDB)
    workdir, go_on, end = folder / "run", folder / "go-on", folder / "end"
    arguments = tiny(
        corpus, workdir, f"training.steps={STEPS}", "training.log_every=1", f"training.checkpoint_every={SAVED}",
        "training.keep_checkpoints=5", "training.wandb=house", "model.layers=1",
    )  # fmt: skip
    faults = {"late": [LATE, str(go_on)], "short": SHORT, "nan": NAN, "slow": SAVED, "last": [STEPS, str(end)]}
    process = started(folder, faults, [*arguments, "--profile=3:2"])
    try:
        while process.poll() is None:
            if f"step {LATE} has taken" in (folder / "stderr.txt").read_text():
                go_on.touch()
            if "the last save has taken" in (folder / "stderr.txt").read_text():
                end.touch()
            time.sleep(0.1)
    finally:
        process.kill()
    assert process.returncode == 0, (folder / "stderr.txt").read_text()[-3000:]
    return folder, workdir, arguments


@pytest.mark.long
def test_a_hung_step_is_told_while_it_hangs(watched):
    text = (watched[0] / "stderr.txt").read_text()
    warning = text[text.index(f"step {LATE} has taken") :]
    took, median = map(float, re.search(r"has taken ([\d.]+) s, those before it took ([\d.e-]+) s", warning).groups())
    assert took >= max(watch.HANGS_SECONDS, watch.HANGS * median * 0.99)
    stacks, after = warning[: warning.index(f"step {LATE} goes on after")], warning
    assert "thread MainThread" in stacks and "llm/training/loop.py" in stacks and "llm/data/loader.py" in stacks
    # The thread that makes batches is where the fault is.
    assert stacks.index("thread batches") > 0 and "faulty.py" in stacks and "time.sleep" in stacks
    assert text.count(f"step {LATE} has taken") == 1
    assert float(re.search(r"goes on after ([\d.]+) s", after)[1]) > took


def test_a_last_save_that_hangs_is_told_too(watched):
    text = (watched[0] / "stderr.txt").read_text()
    warning = text[text.index("the last save has taken") :]
    stacks = warning[: warning.index("the last save goes on after")]
    # The loop waits for the thread that writes, which is where the fault is.
    assert "it may hang" in stacks and "thread MainThread" in stacks and "llm/training/checkpoint.py" in stacks
    assert stacks.index("thread checkpoint") > 0 and "faulty.py" in stacks


def test_steps_are_logged_while_a_checkpoint_is_written(watched):
    assert int((watched[1] / "while-saving.txt").read_text()) > SAVED
    assert (watched[1] / "checkpoints" / str(SAVED) / "manifest.json").is_file()


def test_a_first_step_that_hangs_is_told(monkeypatch, capsys):
    monkeypatch.setattr(watch, "FIRST_SECONDS", 0.1)
    said, deadline = "", time.time() + 20
    with watch.HungSteps() as hung:
        hung.begin(1)
        while "thread MainThread" not in said and time.time() < deadline:
            time.sleep(0.05)
            said += capsys.readouterr().err
        hung.begin(2)
    said += capsys.readouterr().err
    assert re.search(r"step 1 has taken [\d.]+ s: it may hang\nthread MainThread", said), said
    assert said.count("step 1 has taken") == 1 == said.count("step 1 goes on after"), said


def test_a_surplus_compile_names_what_changed(watched):
    text = (watched[0] / "stderr.txt").read_text()
    (line,) = [line for line in text.replace("\r", "\n").splitlines() if "compiled the train step again" in line]
    assert f"step {SHORT} compiled the train step again, as program 2: " in line
    assert re.search(r"batch/positions was int32\[4, 32\] on \S+.* and is int32\[4, 16\] on ", line), line
    seen = {row["step"]: (row["compiles"], row["surplus_compiles"]) for row in rows(watched[1])}
    assert seen == {step: (1, 0) if step < SHORT else (2, 1) for step in range(1, 17)}


def test_dtype_and_sharding_are_named_and_lengths_are_no_surplus(capsys):
    function = jax.jit(lambda state, batch: state + batch["tokens"].sum())
    compiles = watch.Compiles(function, lengths=(8, 16))

    def call(step, state, tokens):
        function(state, {"tokens": tokens})
        compiles.look(step, state, {"tokens": tokens})

    zero = jnp.zeros(())
    for step, length in enumerate((8, 8, 8, 16, 8, 16), 1):
        call(step, zero, jnp.zeros((2, length), jnp.int32))
    assert (compiles.count, compiles.surplus) == (2, 0) and capsys.readouterr().err == ""
    call(7, zero, jnp.zeros((2, 16), jnp.int16))
    assert "batch/tokens was int32[2, 16] on" in (said := capsys.readouterr().err) and "and is int16[2, 16]" in said
    mesh = jax.make_mesh((1,), ("data",))
    place = NamedSharding(mesh, PartitionSpec("data"))
    call(8, zero, jax.device_put(jnp.zeros((2, 16), jnp.int16), place))
    assert re.search(r"and is int16\[2, 16\] on P\w*\('data',\)", capsys.readouterr().err)
    call(9, 0.0, jnp.zeros((2, 16), jnp.int16))
    assert "state was float32[] on" in (said := capsys.readouterr().err) and "is a Python float" in said
    assert (compiles.count, compiles.surplus) == (5, 3)


def test_the_record_has_speed_waiting_and_memory(watched):
    found = {row["step"]: row for row in rows(watched[1])}
    assert set(metrics.OF_THE_MACHINE) <= set(found[1])
    assert all(0 < row["mfu"] < 1 and 0 <= row["input_wait"] <= 1 for row in found.values())
    # Every step has about as many tokens, so its share of the peak goes with its rate.
    ratio = np.array([row["mfu"] / row["tokens_per_second"] for row in found.values()])
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-6)
    assert found[LATE]["input_wait"] > 0.9 > found[1]["input_wait"]
    assert all(5e7 < row["memory_bytes"] <= row["peak_memory_bytes"] < 1e11 for row in found.values())
    summary = json.loads((watched[1] / "summary.json").read_text())
    np.testing.assert_allclose(summary["mfu"] / summary["tokens_per_second"], ratio[0], rtol=1e-6)
    # From the start of the process: imports and compiling take their time.
    assert 1 < summary["first_step_seconds"] < summary["total_seconds"] + 120
    assert summary["first_step_cached"] in (True, False)


def test_memory_is_the_devices_where_it_has_an_account(monkeypatch):
    class Device:
        def __init__(self, used):
            self.used = used

        def memory_stats(self):
            return {"bytes_in_use": self.used, "peak_bytes_in_use": 2 * self.used, "bytes_limit": 100}

    monkeypatch.setattr(jax, "local_devices", lambda: [Device(3), Device(5)])
    assert watch.memory() == {"memory_bytes": 5, "peak_memory_bytes": 10}


def test_wandb_has_the_record(watched):
    calls = [json.loads(line) for line in (watched[0] / "modules" / "calls.jsonl").read_text().splitlines()]
    (_, settings), *logged, last = calls
    assert settings["project"] == "house" and settings["name"] == "run" and settings["resume"] == "allow"
    assert settings["id"] == (watched[1] / "wandb.id").read_text().strip() and len(settings["id"]) == 32
    assert settings["config"]["training"]["steps"] == 16
    sent = {step: numbers for _, step, numbers in logged}
    recorded = rows(watched[1])
    assert [step for _, step, _ in logged] == [row["step"] for row in recorded]
    for row in recorded:
        if row["step"] != NAN:  # NaN is text in ours
            assert sent[row["step"]] | {"step": row["step"]} == row
    assert last == ["finish", 0]


def test_wandb_that_is_not_there_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match="training.wandb='house' needs the package wandb.*pip install wandb"):
        metrics.wandb_package("house")
    assert metrics.wandb_package("") is None


def test_a_profile_is_in_the_runs_folder(watched):
    (trace,) = (watched[1] / "profile").rglob("*.xplane.pb")
    assert b"jit(step)" in trace.read_bytes()


@pytest.mark.parametrize("text", ["3", "3:", "0:1", "3:0", "a:b", "1:2:3", "-1:2"])
def test_a_wrong_profile_is_refused(text):
    with pytest.raises(InputError, match="expected START:COUNT"):
        watch.Profile(text)


def test_a_profile_of_steps_that_are_done_or_never_come_is_refused():
    watch.Profile("3:2").check(done=2, steps=4)
    for done, steps, left in ((3, 9, "steps 4 to 9"), (2, 3, "steps 3 to 3"), (9, 9, "none")):
        with pytest.raises(InputError, match=f"is of steps 3 to 4, of which this run has {left} left to do"):
            watch.Profile("3:2").check(done, steps)


def test_a_skipped_step_keeps_its_batch_and_is_replayed(watched, corpus):
    folder, workdir, arguments = watched
    assert f"step {NAN} is skipped" in (folder / "stderr.txt").read_text()
    assert [path.name for path in (workdir / "diagnostics").iterdir()] == [f"{NAN}.npz"]
    assert np.isnan(np.load(workdir / "diagnostics" / f"{NAN}.npz")["weights"]).all()
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["skipped_steps"] == 1 and summary["steps"] == 16
    env = {"PYTHONPATH": str(folder / "modules")}
    result = verb("train", *arguments, "--debug-nans", **env)
    assert result.returncode == 0, result.stderr
    assert f"step {NAN}: loss nan" in result.stdout
    assert "its batch, dropout and parameters are exactly that step's" in result.stdout  # checkpoint 5
    assert "first: batch weights: 128 of 128 numbers are not finite, the first at [0, 0]: nan" in result.stdout
    assert_refused_last(verb("train", *arguments, "--debug-nans=7", **env), "--debug-nans=7", "are of steps 6")
