"""The launch files of experiments/launch: valid, complete, and started again after exit code 75 alone."""

import os
import re
import signal
import subprocess
import time

import pytest
import yaml

from llm.cli import STOPPED
from tests.helpers import ROOT

FOLDER = ROOT / "experiments" / "launch"
SCRIPTS = sorted(FOLDER.glob("*.sh"))


@pytest.fixture
def place(tmp_path):
    """A folder to launch from, with a python, srun, scontrol and gcloud that note how they are called.

    The n-th run of python ends with the n-th of the exit codes in `codes`.
    """
    wait = "trap 'exit 75' TERM; touch started; while true; do sleep 0.05; done"
    programs = {
        ".venv/bin/python": 'echo "python $*" >>calls; code=$(head -n1 codes); sed -i 1d codes; '
        f'[ "$code" != wait ] || {{ {wait}; }}; exit $code',
        "bin/srun": 'echo "srun $1" >>calls; shift; exec "$@"',
        "bin/scontrol": 'echo "scontrol $*" >>calls',
        "bin/gcloud": 'echo "gcloud $*" >>calls; last="${@: -1}"; exec bash -c "${last#--command=}"',
    }
    for name, text in programs.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{text}\n")
        path.chmod(0o755)
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    (tmp_path / "llm").symlink_to(tmp_path)  # the repository's folder on a host of a pod
    return tmp_path


def launch(place, name, codes, *arguments):
    """(exit code, calls) of a launch script whose runs of python end with these codes."""
    (place / "codes").write_text("".join(f"{code}\n" for code in codes))
    environ = {**os.environ, "PATH": f"{place / 'bin'}:{os.environ['PATH']}", "PAUSE": "0", "SLURM_JOB_ID": "77"}
    command = ["bash", str(FOLDER / name), *arguments]
    done = subprocess.run(command, cwd=place, env=environ, capture_output=True, text=True, timeout=60)
    return done.returncode, (place / "calls").read_text().splitlines()


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_and_say_what_to_fill_in(path):
    assert subprocess.run(["bash", "-n", path], capture_output=True).returncode == 0
    head = path.read_text().split("set -u")[0]
    assert f"experiments/launch/{path.name}" in head and ("Fill in:" in head or path.name == "again.sh")


@pytest.mark.parametrize("name", ["gpu_node.sh", "tpu_pod.sh"])
def test_a_loop_goes_on_after_75_and_ends_with_the_runs_code(place, name):
    code, calls = launch(place, name, [STOPPED, STOPPED, 0], "--config.training.steps=9")
    runs = [call for call in calls if call.startswith("python ")]
    assert code == 0 and len(runs) == 3 and len(set(runs)) == 1
    assert re.search(
        r"-m llm.train --config=\S+ --workdir=\S+ --config.mesh.data=-1 .*--config.training.steps=9", runs[0]
    )
    (place / "calls").unlink()
    code, calls = launch(place, name, [STOPPED, 2, 0])
    assert code == 2 and sum(call.startswith("python ") for call in calls) == 2
    if name == "tpu_pod.sh":
        assert "--worker=all" in calls[0]


def test_slurm_queues_the_job_again_after_75_alone(place):
    code, calls = launch(place, "slurm.sh", [STOPPED])
    assert code == STOPPED and calls[0].startswith("srun ") and calls[2:] == ["scontrol requeue 77"]
    for other in (0, 1, 2):
        (place / "calls").unlink()
        code, calls = launch(place, "slurm.sh", [other])
        assert code == other and not any("scontrol" in call for call in calls)


def test_sigterm_to_the_loop_stops_the_run_and_the_loop(place):
    (place / "codes").write_text("wait\n0\n")
    process = subprocess.Popen(["bash", str(FOLDER / "again.sh"), ".venv/bin/python"], cwd=place)
    while not (place / "started").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == STOPPED
    assert (place / "codes").read_text() == "0\n"  # it was not started again


def test_kubernetes_makes_pods_again_after_75_alone():
    service, job = yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text())
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    codes = {
        code: rule["action"]
        for rule in spec["podFailurePolicy"]["rules"]
        for code in rule.get("onExitCodes", {}).get("values", [])
    }
    assert codes == {STOPPED: "Ignore", 1: "FailJob", 2: "FailJob"}
    assert all(r["onExitCodes"]["containerName"] == container["name"] for r in spec["podFailurePolicy"]["rules"][:2])
    environ = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert int(environ["JAX_NUM_PROCESSES"]) == spec["completions"] == spec["parallelism"]
    # Pod 0's name in the Service's domain.
    host, port = environ["JAX_COORDINATOR_ADDRESS"].split(":")
    assert host == f"{job['metadata']['name']}-0.{pod['subdomain']}" and pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
    assert {"containerPort": int(port)} in container["ports"]
    assert pod["restartPolicy"] == "Never"  # a policy for failed pods demands it
