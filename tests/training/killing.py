"""Kills a run at random moments by SIGKILL and starts it again by the same arguments, until it ends.

`python -m tests.training.killing CORPUS FOLDER SEED` prepares and trains `FOLDER/whole` undisturbed, and then
`FOLDER/killed` with twenty kills, and prints what it saw as JSON. Each start is a child of this process, which has
imported everything but has never touched a device: a start then takes what it takes without the imports.
"""

import contextlib
import json
import os
import pathlib
import random
import re
import signal
import sys
import time
import zlib
from collections.abc import Callable

# What a run imports along its way too.
import matplotlib.pyplot  # noqa: F401
import tensorboardX.event_file_writer  # noqa: F401

import llm.train
from llm import cli

KILLS, STEPS = 20, 140  # the latter of tests/tiniest.py
AIMED = (5, 11, 17)  # kills that wait for a save to be under way


def start(arguments: list[str], log: pathlib.Path) -> int:
    """Runs `llm.train` in a child, its output in a file; returns its process id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout.reconfigure(line_buffering=True)  # pyright: ignore[reportAttributeAccessIssue] # a kill loses no line
    sys.argv = ["llm.train", *arguments]
    try:
        cli.run(llm.train.main)
    except SystemExit as done:
        os._exit(done.code or 0)  # pyright: ignore[reportArgumentType] # cli gives numbers
    finally:
        os._exit(99)


def rows(workdir: pathlib.Path) -> list[int]:
    """Steps of the rows that stand in metrics.jsonl, whole ones alone."""
    path = workdir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [int(found) for found in re.findall(r'^\{"step": (\d+),.*\}$', text, re.MULTILINE)]


def passed(seconds: float) -> Callable[[], bool]:
    """Whether so much time has passed since now."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


def reached(workdir: pathlib.Path, step: int) -> Callable[[], bool]:
    """Whether the record has a step, after it was written anew: every start that reaches the loop does so."""
    path = workdir / "metrics.jsonl"

    def inode() -> int:
        return path.stat().st_ino if path.exists() else 0

    old = inode()
    return lambda: inode() != old and max(rows(workdir), default=0) >= step


def newest_whole(folder: pathlib.Path) -> int:
    """The newest step whose files all have the size and checksum of its manifest; 0 where there is none."""
    for step in sorted((int(p.name) for p in folder.glob("*") if p.name.isdigit()), reverse=True):
        try:
            files = json.loads((folder / str(step) / "manifest.json").read_text())["files"]
            data = {name: (folder / str(step) / name).read_bytes() for name in files}
        except (FileNotFoundError, ValueError):
            continue
        if all([len(data[name]), zlib.crc32(data[name])] == list(said) for name, said in files.items()):
            return step
    return 0


def unfinished(folder: pathlib.Path) -> set[tuple[str, int]]:
    """The steps' folders, each by its name and inode, that have no manifest: written now, or cut off by a kill."""
    found = set()
    for place in folder.glob("*"):
        with contextlib.suppress(FileNotFoundError):
            if place.name.isdigit() and not (place / "manifest.json").exists():
                found.add((place.name, place.stat().st_ino))
    return found


def ended(child: int) -> int | None:
    """The exit code of a child, or None while it runs."""
    found, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def wait(child: int, until: Callable[[], bool], seconds: float, pause: float = 0.01) -> int | None:
    """Waits until something is so, or the child has ended, whose exit code it returns."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        code = ended(child)
        if code is not None or until():
            return code
        time.sleep(pause)
    os.kill(child, signal.SIGKILL)
    raise TimeoutError("nothing more was written")


def main(corpus: str, folder: pathlib.Path, seed: int) -> dict:
    """What became of both runs."""
    draw = random.Random(seed)
    whole, killed = folder / "whole", folder / "killed"
    arguments = [f"--config.data.train={corpus}", "--config=tests/tiniest.py"]
    began = time.monotonic()
    child = start([*arguments, f"--workdir={whole}"], folder / "whole.txt")
    wait(child, lambda: bool(rows(whole)), 200)
    startup = time.monotonic() - began
    code = wait(child, lambda: False, 200)
    if code != 0:
        raise RuntimeError(f"the undisturbed run exited {code}: {(folder / 'whole.txt').read_text()}")

    starts = []
    while True:
        last, aimed = len(starts) == KILLS, len(starts) in AIMED
        checkpoints = killed / "checkpoints"
        before, expected, cut_off = max(rows(killed), default=0), newest_whole(checkpoints), unfinished(checkpoints)
        log = folder / f"killed-{len(starts)}.txt"
        child = start([*arguments, f"--workdir={killed}"], log)
        if last:
            code = wait(child, lambda: False, 300)
        else:
            # Half of them while it starts, half in the steps after it or in the saves between them.
            passes = passed(draw.random() * startup if draw.random() < 0.5 and not aimed else 200)
            reaches = reached(killed, min(expected + (1 if aimed else draw.randint(1, 30)), STEPS - 2))
            began = time.monotonic()
            code = wait(child, lambda: passes() or reaches(), 300)  # noqa: B023 # called at once
            if aimed and code is None:
                code = wait(child, lambda: bool(unfinished(checkpoints) - cut_off), 300, 0.0005)  # noqa: B023
            elif reaches():
                startup = min(startup, time.monotonic() - began)  # what was compiled and prepared is not again
                time.sleep(draw.random() * 0.03)
            if code is None:
                os.kill(child, signal.SIGKILL)
                code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        resumed = re.findall(r"^resuming at step (\d+) of", log.read_text(), re.MULTILINE)
        starts.append(
            {
                "code": code,
                "rows": before,
                "whole": expected,
                "resumed": int(resumed[0]) if resumed else None,
                "in_a_save": bool(unfinished(checkpoints) - cut_off),
            }
        )
        if last:
            return {"starts": starts, "last": log.read_text()[-2000:]}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], pathlib.Path(sys.argv[2]), int(sys.argv[3]))))
