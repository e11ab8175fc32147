"""The runs of a sweep: checked before any of them starts, launched one after the other, and read from their folders."""

import dataclasses
import json
import math
import pathlib
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from llm import config
from llm.errors import InputError, Stopped
from llm.stop import stop_signal
from llm.sweeps.settings import Setting, check_names

_STOPPED = 75  # the exit code of a verb that saved before it stopped
_POLL_SECONDS = 0.2


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What all runs of a sweep share.

    Attributes:
        location: of the experiment, "experiments/mine.py:variant".
        workdir: the sweep's folder; a run's is workdir/name.
        shared: fields that the command line set for all of them.
    """

    location: str
    workdir: pathlib.Path
    shared: tuple[tuple[str, str], ...] = ()

    def folder(self, setting: Setting) -> pathlib.Path:
        """A run's folder."""
        return self.workdir / setting.name

    def command(self, setting: Setting) -> list[str]:
        """The command of a run, the words after the interpreter."""
        shared = [f"--config.{path}={text}" for path, text in self.shared]
        where = [f"--config={self.location}", f"--workdir={self.folder(setting)}"]
        return ["-m", "llm.train", *where, *shared, *setting.flags()]

    def job(self, setting: Setting) -> str:
        """The same as a line for a shell."""
        return shlex.join([sys.executable, *self.command(setting)])

    def resolve(self, setting: Setting) -> config.Experiment:
        """The experiment of a setting.

        Raises:
            InputError: it names a field that is not there, a value that is not the field's, or what `shared` sets.
        """
        for path, text in self.shared:
            if path in setting.fields:
                raise InputError(f"--config.{path}={text}: the sweep sets this field in {setting.name!r}; leave it out")
        try:
            of_setting = [tuple(flag.removeprefix("--config.").split("=", 1)) for flag in setting.flags()]
            fields = [*self.shared, *((path, text) for path, text in of_setting)]
            return config.resolve(config.override(config.load(self.location), fields))
        except InputError as error:
            raise InputError(f"--config={self.location}, setting {setting.name!r}: {error}") from None

    def check(self, settings: Sequence[Setting]) -> None:
        """Refuses a sweep before anything of it runs.

        Raises:
            InputError: a name is taken twice, a setting does not resolve, or a folder holds a run of another config.
        """
        check_names(settings)
        for setting in settings:
            experiment, path = self.resolve(setting), self.folder(setting) / "config.json"
            changed = config.differences(config.read(path), experiment) if path.is_file() else []
            if changed:
                raise InputError(
                    f"{self.folder(setting)} belongs to another config ({'; '.join(changed)}); name another --workdir, "
                    "or give the old config"
                )


def listed(location: str) -> list[Setting]:
    """The settings that the experiment's sweep() names.

    Raises:
        InputError: there is no sweep(), or it returns anything but a list of settings, or none.
    """
    found = config.stated(location, "sweep")
    if not isinstance(found, (list, tuple)) or not all(isinstance(one, Setting) for one in found):
        raise InputError(
            f"--config={location}: sweep() returned {_kind(found)}, expected a list of llm.sweeps.Setting, as "
            "llm.sweeps.grid makes"
        )
    if not found:
        raise InputError(f"--config={location}: sweep() returned no settings; name at least one")
    return list(found)


def _kind(found: Any) -> str:
    if isinstance(found, (list, tuple)):
        other = next(one for one in found if not isinstance(one, Setting))
        return f"a {type(found).__name__} with a {type(other).__name__} in it"
    return f"a {type(found).__name__}"


def summary_of(folder: pathlib.Path) -> dict[str, Any] | None:
    """The summary of a finished run; None of any other."""
    path = folder / "summary.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def launch(sweep: Sweep, setting: Setting) -> str:
    """Runs a setting to its end, or what is left of it; what it says goes to train.log in its folder.

    Returns "" where it finished, else why it failed, in a line.

    Raises:
        Stopped: a stop signal came, to this process or to the run, and the run has saved.
    """
    folder = sweep.folder(setting)
    if summary_of(folder) is not None:
        return ""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "train.log"
    with stop_signal.deferred(), log.open("ab") as out:
        # A session of its own: Ctrl-C reaches all of a terminal's processes, and a second signal would stop the run
        # before it has saved.
        run = subprocess.Popen(
            [sys.executable, *sweep.command(setting)], stdout=out, stderr=out, start_new_session=True
        )
        try:
            code = _wait(run)
        except Stopped:  # a second signal: at once
            run.kill()
            run.wait()
            raise
    if code == _STOPPED or stop_signal.requested:
        raise Stopped(f"{setting.name} has saved; the same command goes on")
    return "" if code == 0 else f"exit code {code}: {_last_line(log)}"


def _wait(run: subprocess.Popen) -> int:
    """Waits for a run, and hands on the first stop signal."""
    told = False
    while True:
        if stop_signal.requested and not told:
            run.send_signal(signal.SIGTERM)
            told = True
        try:
            return run.wait(timeout=_POLL_SECONDS)
        except subprocess.TimeoutExpired:
            continue


def _last_line(log: pathlib.Path) -> str:
    # Bars return to the start of their line.
    lines = [line.strip() for line in re.split(r"[\r\n]+", log.read_text(encoding="utf-8", errors="replace"))]
    return next((line for line in reversed(lines) if line), "it said nothing")[:300]


def row(sweep: Sweep, setting: Setting, why_failed: str = "") -> dict[str, Any]:
    """A setting's row of sweep.json: its fields, and of a finished run its scores and what it cost."""
    found: dict[str, Any] = {"name": setting.name, "fields": dict(setting.fields), "state": "not run"}
    summary = summary_of(sweep.folder(setting))
    if why_failed:
        return found | {"state": "failed", "why": why_failed}
    if summary is None:
        return found
    names = ("parameters", "steps", "train_tokens", "train_flops", "train_seconds", "total_seconds")
    scores = {name: value for name, value in summary["validation"].items() if isinstance(value, (int, float))}
    finite = {name: value if math.isfinite(value) else None for name, value in scores.items()}
    return found | {"state": "finished", **{name: summary[name] for name in names}, "validation": finite}
