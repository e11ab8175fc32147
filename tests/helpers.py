"""Launching verbs as a user does, and small things to launch them on."""

import os
import pathlib
import subprocess
import sys
from collections.abc import Iterable

import pytest

from llm.data import DataSpec
from llm.data.sources import read_all
from tests.launcher import Launcher

ROOT = pathlib.Path(__file__).parent.parent


def environment(**extra: str) -> dict[str, str]:
    """The environment of a verb's subprocess."""
    return {**os.environ, "JAX_PLATFORMS": "cpu", **extra}


def command(name: str, *arguments: object) -> list[str]:
    """The command line of a verb."""
    return [sys.executable, "-m", f"llm.{name}", *map(str, arguments)]


def launch(name: str, *arguments: object, cwd: pathlib.Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs a verb to its end by its command line."""
    return subprocess.run(
        command(name, *arguments), cwd=cwd, env=environment(**env), capture_output=True, text=True, timeout=550
    )


def _read_early(environment: dict[str, str]) -> dict[str, str]:
    """What is read before a verb's `main`: by the interpreter, and while JAX is imported."""
    return {key: value for key, value in environment.items() if key.startswith(("JAX_", "PYTHON"))}


_AT_THE_START = environment()
_LAUNCHERS: list[Launcher] = []


def verb(name: str, *arguments: object, cwd: pathlib.Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    """As `launch`, its imports saved: a process of its own, forked from one that has imported the verbs.

    Where a test has changed what is read before that, it is launched by its command line.
    """
    if _read_early(environment(**env)) != _read_early(_AT_THE_START):
        return launch(name, *arguments, cwd=cwd, **env)
    if not _LAUNCHERS:
        _LAUNCHERS.append(Launcher(_AT_THE_START, ROOT))
    return _LAUNCHERS[0].run(name, [*map(str, arguments)], cwd, environment(**env), timeout=550)


def long_but(always: Iterable, rows: Iterable) -> list:
    """The rows of a table as parameters of a test, those that are not in `always` as long tests."""
    return [
        row if row in always else pytest.param(*(row if isinstance(row, tuple) else (row,)), marks=pytest.mark.long)
        for row in rows
    ]


def assert_refused(result: subprocess.CompletedProcess[str], *parts: str) -> None:
    """The verb refused its input: exit code 2, one line on stderr that holds all parts, no traceback.

    Bars of progress, which a slow machine gets to see, are no lines.
    """
    lines = [line for line in result.stderr.splitlines() if line.strip() and "%|" not in line]
    assert result.returncode == 2, (result.returncode, result.stderr)
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    for part in parts:
        assert part in lines[0], (part, lines[0])


def assert_refused_last(result, *parts):
    """As assert_refused, for a refusal that comes after progress was shown on stderr."""
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    for part in parts:
        assert part in result.stderr.splitlines()[-1], result.stderr


def write_corpus(folder: pathlib.Path) -> pathlib.Path:
    """Eight documents of about 6,000 characters."""
    text = read_all(DataSpec(), "austen")[2].text
    for n in range(8):
        (folder / f"part{n}.txt").write_text(text[n * 6000 : (n + 1) * 6000], encoding="utf-8")
    return folder


def tiny(corpus: pathlib.Path, workdir: pathlib.Path, *overrides: str) -> list[str]:
    """Arguments of llm.train for a run of seconds on a corpus folder, dropout on."""
    return [
        "--config=tests/tiny.py",
        f"--workdir={workdir}",
        f"--config.data.train={corpus}",
        *(f"--config.{o}" for o in overrides),
    ]
