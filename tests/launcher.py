"""Starts verbs as processes of their own that find their modules imported: importing takes most of a short run's time.

`python -m tests.launcher` imports every verb, reads one request a line from stdin, forks for it, and answers with the
exit code. Nothing of JAX's backends is there before the fork, so that a verb's process sets up its own, as a user's
does. `Launcher` is the other end. Of a request's environment, what is read while importing comes too late.
"""

import atexit
import gc
import importlib
import json
import os
import pathlib
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import traceback

from llm.cli import VERBS


def _become(request: dict) -> None:
    """In the forked process: runs `python -m llm.NAME ARGUMENTS` and never returns."""
    code = 1
    try:
        os.setsid()
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["environment"])
        files = [os.open(os.devnull, os.O_RDONLY)]
        files += [os.open(request[name], os.O_WRONLY | os.O_APPEND) for name in ("stdout", "stderr")]
        for number, file in enumerate(files):
            os.dup2(file, number)
        sys.stdin, sys.stdout = open(0, encoding="utf-8"), open(1, "w", encoding="utf-8")
        sys.stderr = open(2, "w", encoding="utf-8", buffering=1, errors="backslashreplace")
        module = f"llm.{request['name']}"
        del sys.modules[module]
        sys.argv = [module, *request["arguments"]]
        sys.path[0] = request["cwd"]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        # What the end of an interpreter does: threads end, and what was registered for then runs.
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve() -> None:
    """Reads requests until stdin ends."""
    for name in VERBS:
        importlib.import_module(f"llm.{name}")
    backends = importlib.import_module("jax._src.xla_bridge")._backends
    assert not backends, "importing the verbs has set up a backend of JAX, which no fork survives"
    gc.collect()
    gc.freeze()
    # The answers' own way out: what a verb prints goes elsewhere.
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            _become(request)
        signal.signal(signal.SIGALRM, lambda *_, child=child: os.killpg(child, signal.SIGKILL))
        signal.alarm(request["timeout"])
        _, status = os.waitpid(child, 0)
        signal.alarm(0)
        answers.write(f"{os.waitstatus_to_exitcode(status)}\n")
        answers.flush()


class Launcher:
    """A process that starts verbs in an environment."""

    def __init__(self, environment: dict[str, str], root: pathlib.Path):
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.launcher"], cwd=root, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def run(
        self, name: str, arguments: list[str], cwd: pathlib.Path, environment: dict[str, str], timeout: int
    ) -> subprocess.CompletedProcess[str]:
        """Runs a verb to its end; after `timeout` seconds it is killed, which is exit code -9."""
        with tempfile.TemporaryDirectory() as folder:
            places = {kind: pathlib.Path(folder, kind) for kind in ("stdout", "stderr")}
            for place in places.values():
                place.touch()
            request = {"name": name, "arguments": arguments, "cwd": str(cwd), "timeout": timeout}
            request["environment"] = environment
            assert self._process.stdin is not None and self._process.stdout is not None
            self._process.stdin.write(json.dumps(request | {kind: str(x) for kind, x in places.items()}) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
            assert answer, f"the launcher ended with exit code {self._process.wait()}"
            said = {kind: place.read_text(encoding="utf-8", errors="replace") for kind, place in places.items()}
            return subprocess.CompletedProcess(["-m", f"llm.{name}", *arguments], int(answer), **said)


if __name__ == "__main__":
    serve()
