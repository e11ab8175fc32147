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


def open_run(name: str, values: bool = True) -> Run:
    """Opens a run's folder; without `values` its parameters are shapes and places alone, and nothing is read of them.

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
    params, step = restore_params(made_of, experiment.training, mesh, workdir, cli.say_error, values)
    return Run(workdir, experiment, prepared, model, mesh, params, step)


def matching(params: Any, run: Run) -> dict[str, Any]:
    """What another run has for parameters, by name; both may be shapes alone.

    A classification head for other classes is not among it.

    Raises:
        InputError: nothing has the same name, or a shape differs.
    """
    theirs = {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(run.params)}
    found = {}
    for path, mine in jax.tree_util.tree_leaves_with_path(params):
        name = path_name(path)
        if name not in theirs:
            continue
        if theirs[name].shape == mine.shape:
            found[name] = theirs[name]
        elif not name.startswith("class_head/"):
            raise InputError(
                f"training.start_from={run.workdir}: its {name} has shape {theirs[name].shape}, this model's "
                f"{mine.shape}; give the model the same settings"
            )
    if not found:
        raise InputError(f"training.start_from={run.workdir}: no parameter of it has a name of this model")
    return found


def shared(params: Any, run: Run, say: Callable[[str], None] = print) -> Any:
    """Fresh parameters with those of another run in place of the ones that `matching` finds; the others stay fresh.

    Raises:
        InputError: as `matching` does.
    """
    found = matching(params, run)
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    fresh = [name for name in names if name not in found]
    new = f"; new are {', '.join(fresh)}" if fresh else ""
    say(f"starting from {run.workdir}, step {run.step}: {len(found)} of {len(names)} parameter arrays{new}")

    def choose(path, mine):
        name = path_name(path)
        return jax.device_put(found[name], mine.sharding) if name in found else mine

    return jax.tree_util.tree_map_with_path(choose, params)
