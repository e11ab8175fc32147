"""What a run keeps of its steps that were not finite, in `diagnostics/` of its folder: batches, and the last state."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from llm.errors import InputError
from llm.sharding import hosts
from llm.training import state as states
from llm.training.checkpoint import Checkpoints

FOLDER = "diagnostics"
_MOST = 20  # batches that are kept of steps after which the run went on


class Diagnostics:
    """Writes them. `<step>.npz` is the batch of a step, from 1, with its metrics; `<step>/` the state it failed on."""

    def __init__(self, workdir: pathlib.Path, say: Callable[[str], None]):
        self._folder = workdir / FOLDER
        self._say = say

    def save_batch(self, step: int, batch: dict, metrics: dict[str, float], always: bool) -> pathlib.Path | None:
        """Keeps the batch of a step if it is the first of a row of skipped ones, unless there are many; or `always`."""
        path = self._folder / f"{step}.npz"
        # Process 0 looks at the folder for all: each has to take part in fetching the batch, or none.
        many = hosts.from_first(lambda: len(list(self._folder.glob("*.npz"))) >= _MOST)
        if not always and (many or metrics["skipped_in_a_row"] > 1):
            return None
        batch = hosts.fetch(batch)
        if not hosts.first():
            return path
        self._folder.mkdir(exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        named = {f"metrics.{name}": value for name, value in metrics.items()}
        with partial.open("wb") as file:
            np.savez(file, step=step, **named, **batch)
        partial.replace(path)
        return path

    def save_state(self, step: int, state: dict[str, Any], facts: dict) -> None:
        """Keeps the state that a step failed on; where the disk has no room, says so."""
        try:
            checkpoints = Checkpoints(self._folder, 10, self._say)
            hosts.from_first(checkpoints.make_folder)
            checkpoints.save(step, state, **facts)
            checkpoints.wait()
        except OSError as error:
            self._say(f"the state of step {step} could not be kept: {error.strerror}")


class Saved(NamedTuple):
    """A step that was not finite.

    Attributes:
        step: from 1.
        batch: on the host.
        metrics: of the step, by name.
        state: with the parameters to look at it with.
        of: the step after which the parameters were as they are in `state`: step - 1 where they are the step's own.
    """

    step: int
    batch: dict[str, np.ndarray]
    metrics: dict[str, float]
    state: states.TrainState
    of: int


def load(workdir: pathlib.Path, step: int | None, target: states.TrainState, say: Callable[[str], None]) -> Saved:
    """A step that was kept, the one of the latest batch by default; its state, or that of the nearest checkpoint.

    Raises:
        InputError: there is no such step, or no state at all.
    """
    kept = {int(p.stem): p for p in (workdir / FOLDER).glob("*.npz") if p.stem.isdigit()}
    if not kept:
        raise InputError(f"--debug-nans: {workdir} has no step that was not finite")
    if step is None:
        step = max(kept, key=lambda number: (kept[number].stat().st_mtime_ns, number))
    if step not in kept:
        raise InputError(f"--debug-nans={step}: the batches that {workdir} keeps are of steps {_list(kept)}")
    with np.load(kept[step]) as arrays:
        found = {name: arrays[name] for name in arrays.files if name != "step"}
    batch = {name: x for name, x in found.items() if not name.startswith("metrics.")}
    metrics = {name.removeprefix("metrics."): float(x) for name, x in found.items() if name.startswith("metrics.")}

    own = Checkpoints(workdir / FOLDER, 1, say)
    if step in own.newest(1000):
        # A skipped step changes nothing but counters.
        return Saved(step, batch, metrics, states.TrainState(**own.restore(step, states.saved(target))), step - 1)
    checkpoints = Checkpoints(workdir / "checkpoints", 1, say)
    steps = checkpoints.newest(1000)
    if not steps:
        raise InputError(f"--debug-nans={step}: {workdir} has no complete checkpoint to look at the batch with")
    of = nearest(steps, step)
    return Saved(step, batch, metrics, states.TrainState(**checkpoints.restore(of, states.saved(target))), of)


def nearest(steps: Sequence[int], step: int) -> int:
    """The newest of the checkpoints' steps before `step`, and where there is none of those the oldest after it."""
    return max((one for one in steps if one < step), default=min(steps))


def _list(steps) -> str:
    return ", ".join(map(str, sorted(steps)))
