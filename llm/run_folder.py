"""Opening a trained run by its folder: what llm.evaluate, llm.generate and a fine-tuning start from."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax

from llm import cli, config, models, sharding
from llm.data import Prepared, open_prepared
from llm.errors import InputError
from llm.models import Model
from llm.training.loop import recipe, restore_params
from llm.training.optimizer import path_name


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
    model = models.build(experiment.model, prepared.tokenizer.vocab_size, len(prepared.labels))
    made_of = recipe(model, experiment.training, experiment.optimizer, experiment.objective, experiment.seed)
    params, step = restore_params(made_of, experiment.training, mesh, workdir, cli.say_error)
    return Run(workdir, experiment, prepared, model, mesh, params, step)


def shared(params: Any, run: Run, say: Callable[[str], None] = print) -> Any:
    """Fresh parameters with those of another run in place of the ones it has by name; what it lacks stays fresh.

    A classification head for other classes stays fresh too.

    Raises:
        InputError: nothing has the same name, or a shape differs.
    """
    theirs = {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(run.params)}
    fresh = []

    def choose(path, mine):
        name = path_name(path)
        found = theirs.get(name)
        if found is not None and found.shape != mine.shape and not name.startswith("class_head/"):
            raise InputError(
                f"training.start_from={run.workdir}: its {name} has shape {found.shape}, this model's {mine.shape}; "
                "give the model the same settings"
            )
        if found is None or found.shape != mine.shape:
            fresh.append(name)
            return mine
        return jax.device_put(found, mine.sharding)

    chosen = jax.tree_util.tree_map_with_path(choose, params)
    count = len(jax.tree.leaves(params))
    if len(fresh) == count:
        raise InputError(f"training.start_from={run.workdir}: no parameter of it has a name of this model")
    new = f"; new are {', '.join(fresh)}" if fresh else ""
    say(f"starting from {run.workdir}, step {run.step}: {count - len(fresh)} of {count} parameter arrays{new}")
    return chosen
