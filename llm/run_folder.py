"""Opening a trained run by its folder: what llm.evaluate and llm.generate start from."""

import dataclasses
import pathlib
from typing import Any

import jax

from llm import cli, config, models, sharding
from llm.data import Prepared, open_prepared
from llm.models import Model
from llm.training.loop import restore_params


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A trained run: its config, data, model, and the parameters of its newest complete checkpoint, at `step`."""

    workdir: pathlib.Path
    experiment: config.Experiment
    prepared: Prepared
    model: Model
    mesh: jax.sharding.Mesh
    params: Any
    step: int


def open_run(name: str) -> Run:
    """Opens a run's folder.

    Raises:
        InputError: no such folder, no run in it, data that changed, or no complete checkpoint.
    """
    workdir = cli.existing_workdir(name)
    experiment = config.read(workdir / "config.json")
    prepared = open_prepared(workdir, experiment.objective)
    sharding.request_cpu_devices(experiment.mesh)
    mesh = sharding.make_mesh(experiment.mesh)
    model = models.build(experiment.model, prepared.tokenizer.vocab_size)
    params, step = restore_params(
        model, experiment.training, experiment.optimizer, experiment.seed, mesh, workdir, cli.say_error
    )
    return Run(workdir, experiment, prepared, model, mesh, params, step)
