"""The parameters of a trained run, as everything but training uses them: averaged, and with adapters merged."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from llm.errors import InputError
from llm.training import state as states
from llm.training.adapters import LORA, Adapters, without
from llm.training.checkpoint import Checkpoints, Retention
from llm.training.roles import path_name


@dataclasses.dataclass(frozen=True, eq=False)
class Weights:
    """The parameters in a run's newest checkpoints, `steps` with the newest first; of several, the mean is taken.

    Attributes:
        part: of a state that they are, "params" or "ema".
        held: shapes, dtypes and places of what a checkpoint holds, adapters beside the model's parameters.
    """

    checkpoints: Checkpoints
    steps: tuple[int, ...]
    part: str
    held: dict[str, Any]
    adapters: Adapters | None

    @property
    def shapes(self) -> dict[str, Any]:
        """Shapes, dtypes and places of the model's parameters."""
        return without(self.held)

    @property
    def fingerprints(self) -> dict[str, str]:
        """Those of the data and the tokenizer that the run was trained with."""
        return self.checkpoints.facts(self.steps[0])["fingerprints"]

    def read(self) -> dict[str, Any]:
        """The model's parameters."""
        total = self._read(self.steps[0])
        for step in self.steps[1:]:
            total = jax.tree.map(jax.numpy.add, total, self._read(step))
        return total if len(self.steps) == 1 else jax.tree.map(lambda x: x / len(self.steps), total)

    def read_array(self, path: str) -> np.ndarray:
        """One of the model's parameters, on the host, in the memory of a few of it."""
        total = self._read_array(self.steps[0], path)
        for step in self.steps[1:]:
            total = total + self._read_array(step, path)
        return total if len(self.steps) == 1 else total / np.float32(len(self.steps))

    def _read(self, step: int) -> dict[str, Any]:
        params = self.checkpoints.restore_part(step, {self.part: self.held})[self.part]
        return params if self.adapters is None else jax.jit(self.adapters.merge)(params)

    def _read_array(self, step: int, path: str) -> np.ndarray:
        places = {path_name(at): x for at, x in jax.tree_util.tree_leaves_with_path(self.held)}

        def held(name: str) -> np.ndarray:
            return self.checkpoints.restore_array(step, f"{self.part}/{name}", places[name])

        if self.adapters is None or f"{LORA}/{path}/a" not in places:
            return held(path)
        parts = (held(name) for name in (path, f"{LORA}/{path}/a", f"{LORA}/{path}/b"))
        return np.asarray(self.adapters.merged(path, *parts))


def open_weights(
    made_of: states.Recipe,
    mesh: jax.sharding.Mesh,
    workdir: pathlib.Path,
    keep: Retention,
    say: Callable[[str], None] = print,
    average: int = 1,
    checkpoint: str = "",
) -> Weights:
    """The parameters of a run's newest complete checkpoint, the mean of its newest `average` ones, or those of one.

    Where the run kept a moving average of them, that is taken, and `say` is told so.

    Args:
        keep: the run's settings, which say what is best.
        checkpoint: the step that is taken, or "best"; "" takes the newest.

    Raises:
        InputError: there is no complete checkpoint, or fewer than `average`, or not that one.
    """
    if average < 1:
        raise InputError(f"--average={average} must be at least 1")
    checkpoints = Checkpoints(workdir / "checkpoints", keep, say)
    if checkpoint:
        if average > 1:
            raise InputError(f"--checkpoint={checkpoint} is one checkpoint, --average={average} the mean of the newest")
        steps = (_named(checkpoints, checkpoint, workdir),)
    else:
        steps = checkpoints.newest(average)
    if not steps:
        raise InputError(f"{workdir} holds no complete checkpoint: train it first")
    if len(steps) < average:
        raise InputError(
            f"--average={average}: {workdir} holds {len(steps)} complete checkpoints; give at most that, or train "
            "with more in training.keep_checkpoints"
        )
    part = "params" if made_of.ema_decay is None else "ema"
    if part == "ema":
        say(f"{workdir}: the moving average of its parameters is taken (training.ema_decay={made_of.ema_decay})")
    if average > 1:
        say(f"{workdir}: the mean of the checkpoints of steps {', '.join(map(str, sorted(steps)))} is taken")
    return Weights(checkpoints, steps, part, states.abstract(made_of, mesh).params, made_of.adapters)


def _named(checkpoints: Checkpoints, name: str, workdir: pathlib.Path) -> int:
    """The step that --checkpoint names."""
    if name != "best" and not name.isdecimal():
        raise InputError(f"--checkpoint={name}: expected a step, or best")
    step = checkpoints.best() if name == "best" else int(name)
    if step is None:
        raise InputError(
            f"--checkpoint=best: {workdir} keeps no best one (training.keep_best), or was not validated yet"
        )
    if not checkpoints.complete(step):
        raise InputError(
            f"--checkpoint={name}: {workdir} has no complete checkpoint of step {step}; "
            f"python -m llm.train --workdir={workdir} --inspect lists them"
        )
    return step
