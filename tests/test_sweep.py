"""llm.sweep: what it refuses before anything runs, stops and goes on with, and finds; a search by optuna."""

import json
import math
import shlex
import signal
import subprocess
import sys
import time

import pytest

from llm import sweep as verb
from llm.errors import InputError, Stopped
from llm.sweeps import Setting, grid, report, search
from llm.sweeps.runs import Sweep
from tests.helpers import ROOT, assert_refused, command, environment
from tests.helpers import verb as launch_verb

HEAD = "from llm.sweeps import Range, Setting, grid\nfrom tests.tiny import get_config\n"
TWO = HEAD + (
    "def sweep():\n"
    "    return [Setting('bad', {'data.holdout': ('nobody',)}), Setting('good', {'optimizer.learning_rate': 3e-3})]\n"
)


def written(tmp_path, text):
    path = tmp_path / "swept.py"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("body", "parts"),
    [
        ("", ["defines no sweep(variant)"]),
        ("def sweep(): return []", ["sweep() returned no settings"]),
        ("def sweep(): return {'a': 1}", ["sweep() returned a dict, expected a list of llm.sweeps.Setting"]),
        ("def sweep(): return [{'a': 1}]", ["a list with a dict in it"]),
        ("def sweep(): return 1 / 0", ["swept.py:3: ZeroDivisionError"]),
        (
            "def sweep(): return grid({'optimizer.learnig_rate': (1e-3, 3e-3)})",
            ["setting 'learnig_rate=0.001'", "optimizer has no field 'learnig_rate'", "'learning_rate' (nearest)"],
        ),
        ("def sweep(): return grid({'model.width': (32, 33)})", ["setting 'width=33'", "does not divide"]),
        ("def sweep(): return grid({'model.width': (32, 'wide')})", ["setting 'width=wide'", "expected an integer"]),
        (
            "def sweep(): return grid({'optimizer.learning_rate': (1e-3, 1.00001e-3)})",
            ["two settings have the name 'learning_rate=0.001'"],
        ),
        ("def sweep(): return [Setting('../x', {})]", ["'../x' cannot be a folder's"]),
        ("def sweep(): return [Setting('x', {'model.layers': object()})]", ["model.layers", "object cannot"]),
        ("def sweep(): return grid({'training.steps': (4, 8)})", ["--config.training.steps=6: the sweep sets this"]),
    ],
)
def test_a_sweep_is_refused_before_anything_runs(tmp_path, body, parts):
    path = written(tmp_path, HEAD + body)
    with pytest.raises(InputError) as error:
        verb.main([f"--config={path}", f"--workdir={tmp_path / 'runs'}", "--config.training.steps=6"])
    for part in parts:
        assert part in str(error.value)
    assert not (tmp_path / "runs").exists()


def test_a_folder_of_another_config_is_refused(tmp_path, finished_run):
    (tmp_path / "good").mkdir()
    (tmp_path / "good" / "config.json").write_text((finished_run / "config.json").read_text())
    path = written(tmp_path, TWO)
    result = launch_verb("sweep", f"--config={path}", f"--workdir={tmp_path}")
    assert_refused(result, f"{tmp_path / 'good'} belongs to another config", "optimizer.learning_rate: 0.001 -> 0.003")


@pytest.mark.long
def test_stopped_it_goes_on_names_what_failed_and_finishes_the_rest(tmp_path, corpus):
    path, workdir = written(tmp_path, TWO), tmp_path / "runs"
    arguments = [f"--config={path}", f"--workdir={workdir}", f"--config.data.train={corpus}",
                 "--config.training.steps=6", "--config.generation.prompts=()"]  # fmt: skip
    process = subprocess.Popen(
        command("sweep", *arguments), cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    while not (workdir / "bad" / "train.log").exists() and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 75 and err.startswith("stopped: bad has saved"), (out, err)
    assert not (workdir / "good").exists()

    result = launch_verb("sweep", *arguments)
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    *said, last = result.stderr.strip().splitlines()
    assert last.startswith("error: 1 of 2 runs failed: bad;")
    assert said[-1].startswith("bad failed, exit code 2: error: data.holdout") and "nobody" in said[-1]
    summary = json.loads((workdir / "good" / "summary.json").read_text())
    found = json.loads((workdir / "sweep.json").read_text())
    bad, good = found["runs"]
    assert found["best"] == "good" and bad["state"] == "failed" and "nobody" in bad["why"]
    assert good["state"] == "finished" and good["fields"] == {"optimizer.learning_rate": 3e-3}
    assert good["validation"]["loss"] == summary["validation"]["loss"] and good["steps"] == 6
    # 6 a parameter and token but for the table's look-up, and attention's 12 L N H S.
    config = json.loads((workdir / "good" / "config.json").read_text())
    assert (config["optimizer"]["learning_rate"], config["training"]["steps"]) == (3e-3, 6)
    expected = (6 * summary["parameters"] + 12 * 2 * 4 * 8 * 32) * summary["train_tokens"]
    assert good["train_flops"] == pytest.approx(expected)
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("  good ")]
    loss, seconds = f"{summary['validation']['loss']:.4f}", f"{summary['total_seconds']:.0f}"
    assert line.split() == ["good", loss, seconds, "s", "best"]
    assert (workdir / "sweep.png").stat().st_size > 5000

    jobs = launch_verb("sweep", *arguments, "--print-jobs").stdout.splitlines()
    (job,) = jobs  # the finished one is not printed
    assert shlex.split(job)[:3] == [sys.executable, "-m", "llm.train"] and f"--workdir={workdir / 'bad'}" in job
    assert "--config.data.holdout=('nobody',)" in shlex.split(job) and "--config.training.steps=6" in job


def test_grids_and_lines():
    settings = grid({"model.width": (32, 64), "model.layers": (2,), "data.holdout": (("a", "b"), ())})
    assert [s.name for s in settings] == ["width=32,holdout=a+b", "width=32,holdout=", "width=64,holdout=a+b",
                                          "width=64,holdout="]  # fmt: skip
    assert settings[0].flags() == ["--config.model.width=32", "--config.model.layers=2",
                                   "--config.data.holdout=('a', 'b')"]  # fmt: skip

    def rows(settings):
        return [
            {"name": s.name, "fields": s.fields, "state": "finished", "validation": {"loss": i}}
            for i, s in enumerate(settings)
        ]

    swept = rows(grid({"model.width": (32, 64), "optimizer.learning_rate": (0.4, 0.1, 0.2)}))
    field, drawn = report.lines(swept)
    assert field == "optimizer.learning_rate"
    assert drawn == {"width=32": [(0.1, 1), (0.2, 2), (0.4, 0)], "width=64": [(0.1, 4), (0.2, 5), (0.4, 3)]}
    # Where every field changes with every other, settings are places in a row.
    rungs = rows([Setting(f"r{n}", {"model.width": n, "training.steps": n * n}) for n in (1, 2, 3)])
    assert report.lines(rungs) == ("", {"": [(0, 0), (1, 1), (2, 2)]})
    best = report.best([*rungs[1:], {"name": "x", "fields": {}, "state": "failed", "why": "because"}])
    assert best is not None and best["name"] == "r2"
    assert "because" in report.table([*rungs, {"name": "x", "fields": {}, "state": "failed", "why": "because"}])


SEARCHED = (
    HEAD + "def search(): return {'optimizer.learning_rate': Range(1e-4, 1e-1, log=True), 'model.layers': (2, 4)}\n"
)


@pytest.mark.parametrize(
    ("body", "parts"),
    [
        ("", ["defines no search(variant)"]),
        ("def search(): return {}", ["search() returned {}"]),
        ("def search(): return {'model.width': Range(8, 4)}", ["model.width", "low must be below high"]),
        ("def search(): return {'optimizer.momentum': Range(0.0, 0.9, log=True)}", ["above 0"]),
        ("def search(): return {'model.width': [8, 16]}", ["model.width=[8, 16]", "tuple"]),
        ("def search(): return {'model.widht': (8, 16)}", ["'width' (nearest)"]),
        ("def search(): return {'model.layers': Range(1.5, 2.5)}", ["model.layers=1.5: expected an integer"]),
    ],
)
def test_a_search_is_refused_before_anything_runs(tmp_path, body, parts):
    with pytest.raises(InputError) as error:
        search.space_of(Sweep(str(written(tmp_path, HEAD + body)), tmp_path / "runs"))
    for part in parts:
        assert part in str(error.value)


def test_without_optuna_a_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    arguments = [f"--config={written(tmp_path, SEARCHED)}", f"--workdir={tmp_path / 'runs'}"]
    with pytest.raises(InputError, match="pip install optuna==5.0.0"):
        verb.main([*arguments, "--optuna=3"])
    with pytest.raises(InputError, match="--optuna=0: expected at least 1 trial"):
        verb.main([*arguments, "--optuna=0"])
    with pytest.raises(InputError, match="give one of the two"):
        verb.main([*arguments, "--optuna=3", "--print-jobs"])
    assert not (tmp_path / "runs").exists()


def test_a_search_goes_on_where_it_was_stopped(tmp_path):
    """Losses by a formula in place of runs: what is tested is the study and its file."""
    pytest.importorskip("optuna", reason="pip install -r tests/requirements.txt")
    sweep = Sweep(str(written(tmp_path, SEARCHED)), tmp_path)
    space, ran, stop = search.space_of(sweep), [], [3]

    def launch(setting):
        if len(ran) in stop:
            stop.remove(len(ran))
            raise Stopped("as asked")
        ran.append(setting)
        return "exit code 1: it broke" if len(ran) == 5 else ""

    def row(setting, why):
        loss = (math.log10(setting.fields["optimizer.learning_rate"]) + 2) ** 2 + setting.fields["model.layers"]
        found = {"name": setting.name, "fields": setting.fields}
        return found | ({"state": "failed", "why": why} if why else {"state": "ok", "validation": {"loss": loss}})

    said: list[str] = []
    with pytest.raises(Stopped):
        search.search(sweep, space, 12, launch, row, said.append)
    interrupted = said[-1]
    rows = search.search(sweep, space, 12, launch, row, said.append)
    # The stopped trial is run with its own values; no value is drawn again by the new process.
    assert interrupted == said[3] == said[4] and interrupted.startswith("trial-003 of 12: optimizer.learning_rate=")
    assert [setting.name for setting in ran] == [f"trial-{n:03d}" for n in range(12)]
    assert len({setting.fields["optimizer.learning_rate"] for setting in ran}) == 12
    assert all(1e-4 <= s.fields["optimizer.learning_rate"] <= 1e-1 and s.fields["model.layers"] in (2, 4) for s in ran)
    assert [row["state"] for row in rows] == ["failed" if n == 4 else "ok" for n in range(12)]
    found = report.best(rows)
    assert found is not None and found["fields"]["model.layers"] == 2 and found["validation"]["loss"] < 2.5
    # Finished: nothing is run again, and another space is another study.
    again = search.search(sweep, space, 12, launch, row, said.append)
    assert len(ran) == 12 and [row["state"] for row in again] == [row["state"] for row in rows]
    with pytest.raises(InputError, match="study.log searched"):
        search.search(sweep, {"model.layers": (2, 4)}, 13, launch, row, said.append)
