"""Two real processes as one run, over gloo, launched as a user launches them.

Equality here: two CPU devices in one process or in two, float32, jitted, dropout on, within 1e-5. The third step is one
of NaN: in one process all of it, in two the second one's rows alone.
"""

import json
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from llm.sharding import hosts
from llm.training.metrics import OF_THE_MACHINE
from tests.helpers import ROOT, command, environment, tiny, verb

SHORT = (
    "training.steps=120",
    "training.validate_every=4",
    "training.validation_rows=8",
    "training.checkpoint_every=50",
)


NAN = 3


def faulty(arguments, step):
    """The command line of a run whose batch of a step is not of numbers."""
    faults = json.dumps({"late": [0, ""], "short": 0, "nan": step, "slow": 0, "last": [0, ""]})
    return [sys.executable, "-m", "tests.training.faulty", faults, *map(str, arguments)]


def start_two(arguments, others=None, name="train"):
    """Two processes of a verb; the second with other arguments where they are given."""
    return start_commands([command(name, *arguments), command(name, *(arguments if others is None else others))])


def start_commands(commands):
    """Two processes that are one run."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    return [
        subprocess.Popen(
            line, cwd=ROOT, text=True,
            env=environment(JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES="2", JAX_PROCESS_ID=str(process)),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for process, line in enumerate(commands)
    ]  # fmt: skip


def end(processes):
    """Exit codes, and what each printed, without what the network library says."""
    try:
        said = [process.communicate(timeout=400) for process in processes]
    finally:
        for process in processes:
            process.kill()
    lines = [[line for text in both for line in text.splitlines() if "[Gloo]" not in line and line] for both in said]
    return [process.returncode for process in processes], lines


def rows(workdir):
    path = workdir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, corpus):
    """A run of one process with the mesh that two will have."""
    workdir = tmp_path_factory.mktemp("hosts") / "one"
    line = faulty(tiny(corpus, workdir, *SHORT, "mesh.cpu_devices=2"), NAN)
    result = subprocess.run(line, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr
    return workdir


@pytest.mark.long
def test_two_processes_train_stop_together_and_one_goes_on(one_process, corpus, tmp_path):
    workdir = tmp_path / "two"
    arguments = tiny(corpus, workdir, *SHORT)
    processes = start_commands([command("train", *arguments), faulty(arguments, NAN)])
    deadline = time.time() + 400
    while len(rows(workdir)) < 4 and all(process.poll() is None for process in processes) and time.time() < deadline:
        time.sleep(0.02)
    processes[1].send_signal(signal.SIGTERM)
    codes, (said, silent) = end(processes)
    assert codes == [75, 75], (codes, said, silent)
    assert silent == []
    # Both skipped the step that only one had bad rows in; the whole of its batch is kept, once.
    assert [path.name for path in (workdir / "diagnostics").iterdir()] == [f"{NAN}.npz"]
    assert [f"step {NAN} is skipped" in line for line in said].count(True) == 1, said
    kept, whole = (dict(np.load(folder / "diagnostics" / f"{NAN}.npz")) for folder in (workdir, one_process))
    assert np.isfinite(kept["weights"][:2]).all() and np.isnan(kept["weights"][2:]).all()
    for name in ("tokens", "targets", "segments"):
        np.testing.assert_array_equal(kept[name], whole[name])
    saved = max(int(place.name) for place in (workdir / "checkpoints").iterdir())
    assert 8 <= saved < 120 and said[-1] == f"stopped: saved step {saved} of 120; the same command goes on"

    result = verb("train", *arguments)  # one process, with one device
    assert result.returncode == 0 and f"resuming at step {saved} of 120" in result.stdout, result.stderr
    found, want = rows(workdir), rows(one_process)
    assert [row["step"] for row in found] == [row["step"] for row in want]
    for one, other in zip(found, want):
        assert one.keys() == other.keys()
        for name in one.keys() - set(OF_THE_MACHINE):
            # A loss, its gradient, and, every second row, a validation: the same in either split.
            np.testing.assert_allclose(one[name], other[name], rtol=1e-5 if "norm" not in name else 1e-3, err_msg=name)
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (workdir, one_process)]
    assert summaries[0]["train_tokens"] == summaries[1]["train_tokens"]
    assert [summary["skipped_steps"] for summary in summaries] == [1, 1]

    codes, (said, silent) = end(start_two([*arguments, "--debug-nans"]))
    assert codes == [2, 2] and silent == [] and "one process looks at a step for all" in said[-1], (said, silent)
    result = verb("train", *arguments, "--debug-nans")
    assert result.returncode == 0 and f"step {NAN}: loss nan" in result.stdout, result.stderr
    assert result.stdout.splitlines()[-1].startswith("first: batch weights: 64 of 128 numbers are not finite")


@pytest.mark.long
def test_two_processes_evaluate_as_one_does(one_process, corpus, tmp_path):
    """A run's end, which is killed before its summary, and llm.evaluate, by two processes."""
    workdir = tmp_path / "ended"
    shutil.copytree(one_process, workdir)
    (workdir / "summary.json").unlink()
    want = json.loads((one_process / "summary.json").read_text())
    codes, (said, silent) = end(start_two(tiny(corpus, workdir, *SHORT)))
    assert codes == [0, 0] and silent == [], (codes, said, silent)
    assert any("goes on on another mesh (mesh.cpu_devices: 2 -> 1)" in line for line in said)
    found = json.loads((workdir / "summary.json").read_text())
    assert found["samples"] == want["samples"] and (workdir / "curves.png").is_file()
    codes, (said, silent) = end(start_two([f"--workdir={workdir}"], name="evaluate"))
    assert codes == [0, 0] and silent == [], (codes, said, silent)
    again = json.loads((workdir / "evaluation.json").read_text())
    for name, value in want["validation"].items():
        for other in (found, again):
            np.testing.assert_allclose(other["validation"][name], value, rtol=1e-6)


def test_what_one_process_cannot_do_ends_both(corpus, tmp_path):
    (tmp_path / "file").write_text("precious")
    right, wrong = (tiny(corpus, tmp_path / name) for name in ("run", "file"))
    codes, (said, silent) = end(start_two(right, wrong))
    assert codes == [2, 2] and silent == [], (codes, said, silent)
    assert said[-1] == f"error: process 1: --workdir={tmp_path / 'file'} is a file, expected a folder"
    codes, (said, silent) = end(start_two(tiny(tmp_path / "nowhere", tmp_path / "run")))
    assert codes == [2, 2] and silent == [] and "there is no corpus" in said[-1], (codes, said, silent)


@pytest.mark.parametrize(
    "environ, how",
    [
        ({}, None),
        ({"SLURM_STEP_NODELIST": "a", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, None),
        ({"SLURM_STEP_NODELIST": "a[1-2]", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, {}),
        ({"SLURM_NTASKS": "2"}, None),  # a batch script outside srun
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:5"}, {}),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "mpirun -x JAX_COORDINATOR_ADDRESS"),
        ({"PMI_SIZE": "1", "PMI_RANK": "0"}, None),
        ({"PMI_SIZE": "4", "PMI_RANK": "3"}, "PMI_SIZE=4.*mpiexec -genv JAX_COORDINATOR_ADDRESS HOST:PORT"),
        ({"SLURM_STEP_NODELIST": "a[1-2]", "SLURM_PROCID": "0", "SLURM_NTASKS": "2", "PMI_SIZE": "2"}, {}),
        (
            {"JAX_COORDINATOR_ADDRESS": "h:1", "PMI_SIZE": "4", "PMI_RANK": "3"},
            {"coordinator_address": "h:1", "num_processes": 4, "process_id": 3},
        ),
        ({"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, None),
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_NUM_PROCESSES is set and JAX_PROCESS_ID is not"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID=2 with JAX_NUM_PROCESSES=2"),
        ({"JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"}, "JAX_NUM_PROCESSES='two': expected a number"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, "JAX_COORDINATOR_ADDRESS=: expected HOST:PORT"),
        (
            {"JAX_COORDINATOR_ADDRESS": "h:1", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"},
            {"coordinator_address": "h:1", "num_processes": 4, "process_id": 3},
        ),
    ],
)  # fmt: skip
def test_what_a_launcher_sets(environ, how):
    if isinstance(how, str):
        with pytest.raises(hosts.InputError, match=how):
            hosts.launched({"JAX_PLATFORMS": "cpu"} | environ)
    else:
        found = hosts.launched({"JAX_PLATFORMS": "cpu"} | environ)
        assert found == how or found == how | {"cluster_detection_method": "deactivate"}
