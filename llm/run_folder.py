"""Opening a trained run by its folder: what llm.evaluate, llm.generate and a fine-tuning start from."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from llm import cli, config, models, sharding
from llm.data import Prepared, open_prepared
from llm.data.preparation import DATA, TOKENIZER
from llm.errors import InputError
from llm.models import Model
from llm.sharding import hosts
from llm.tokenization import Tokenizer
from llm.training.adapters import LORA
from llm.training.loop import recipe, retention
from llm.training.restore import Weights, open_weights
from llm.training.roles import path_name

IMPORTED = "imported.json"


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A trained or imported run: its config, tokenizer, model, and the parameters of its newest checkpoint, at `step`.

    Attributes:
        params: the model's: the average where the run kept one, adapters merged; or their shapes and places alone.
        weights: where they are read from.
        data: what it is trained on; None where weights of others were imported, or it is somewhere else.
        labels: the names of the classes; () where there are none.
    """

    workdir: pathlib.Path
    experiment: config.Experiment
    tokenizer: Tokenizer
    labels: tuple[str, ...]
    data: Prepared | None
    model: Model
    mesh: jax.sharding.Mesh
    params: Any
    weights: Weights

    @property
    def step(self) -> int:
        """That of its newest checkpoint."""
        return self.weights.steps[0]

    @property
    def prepared(self) -> Prepared:
        """Its data.

        Raises:
            InputError: there is none.
        """
        if self.data is None:
            raise InputError(f"{self.workdir} was imported and has no data of its own: name some by --data=FOLDER")
        return self.data


def open_run(name: str, values: bool = True, data: str = "", average: int = 1, checkpoint: str = "") -> Run:
    """Opens a run's folder.

    Args:
        name: the folder.
        values: without them its parameters are shapes and places alone, and nothing is read of them.
        data: a folder that other data were prepared in, to be taken in place of its own.
        average: newest checkpoints whose mean the parameters are.
        checkpoint: the step whose they are, or "best"; "" takes the newest.

    Raises:
        InputError: no such folder, no run in it, data that changed or are of another tokenizer or other classes, or not
            as many complete checkpoints.
    """
    workdir = cli.existing_workdir(name)
    experiment = config.read(workdir / "config.json")
    imported = origin(workdir)
    own = (
        None if imported is not None and not (workdir / DATA).exists() else open_prepared(workdir, experiment.objective)
    )
    tokenizer = Tokenizer.load(workdir / TOKENIZER)
    labels = tuple(imported["labels"] if imported is not None else own.labels if own is not None else ())
    prepared = open_prepared(cli.existing_workdir(data), experiment.objective) if data else own
    if prepared is not None and prepared.tokenizer.fingerprint != tokenizer.fingerprint:
        raise InputError(
            f"{data or workdir} was prepared by another tokenizer than the model's; prepare it with "
            f"--config.tokenizer.path={workdir / TOKENIZER}"
        )
    if prepared is not None and tuple(prepared.labels) != labels:
        raise InputError(f"{data or workdir}: its classes are {prepared.labels}, the model's {list(labels)}")
    say = cli.say_error if hosts.first() else lambda _: None
    mesh = _mesh(experiment.mesh, say)
    model = models.build(experiment.model, tokenizer.vocab_size, len(labels))
    made_of = recipe(model, experiment.training, experiment.optimizer, experiment.objective, experiment.seed)
    keep = retention(experiment.training)
    weights = open_weights(made_of, mesh, workdir, keep, say, average, checkpoint)
    if weights.fingerprints["tokenizer"] != tokenizer.fingerprint:
        raise InputError(f"{workdir / TOKENIZER} is not the tokenizer that the model was made with; put that one back")
    params = weights.read() if values else weights.shapes
    return Run(workdir, experiment, tokenizer, labels, prepared, model, mesh, params, weights)


def _mesh(spec: sharding.MeshSpec, say: Callable[[str], None]) -> jax.sharding.Mesh:
    """The run's mesh, or one of the devices that are here: what was trained on many is read on one."""
    sharding.request_cpu_devices(spec)
    try:
        return sharding.make_mesh(spec)
    except InputError as error:
        mesh = sharding.make_mesh(sharding.MeshSpec(spec.cpu_devices))
        say(f"{error}: each of the {mesh.size} here takes the whole model and a part of the rows")
        return mesh


def refuse_imported(workdir: pathlib.Path) -> None:
    """Raises InputError when a folder holds imported weights: other data or steps would replace what they need."""
    if (workdir / IMPORTED).is_file():
        raise InputError(
            f"--workdir={workdir} holds imported weights; name another folder, and this run's tokenizer by "
            f"--config.tokenizer.path={workdir / TOKENIZER}"
        )


def origin(workdir: pathlib.Path) -> dict[str, Any] | None:
    """What `llm.convert` said of where a run's weights came from; None of a run that was trained here."""
    path = workdir / IMPORTED
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def matching(params: Any, run: Run, labels: Sequence[str] = ()) -> dict[str, Any]:
    """What another run has for parameters, by name; both may be shapes alone.

    The rules of a warm start: a parameter is taken from the other run where that has one of its name and shape. What
    that run lacks starts anew, and so does a classification head for classes of other names than `labels`; those of
    the same names are brought into its order. What this model lacks is left out. Any other difference of shape is
    refused, and a run without a common name too. Moments, schedule, step and place in the data always start anew.

    Raises:
        InputError: nothing has the same name, or a shape differs.
    """
    theirs = {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(run.params)}
    found = {}
    for path, mine in jax.tree_util.tree_leaves_with_path(params):
        name = path_name(path)
        if name not in theirs:
            continue
        if name.startswith("class_head/"):  # all of it has the classes along its last axis
            if sorted(run.labels) != sorted(labels):
                continue
            order = np.array([run.labels.index(label) for label in labels])
            if not isinstance(theirs[name], jax.ShapeDtypeStruct):
                theirs[name] = theirs[name][..., order]
        if theirs[name].shape == mine.shape:
            found[name] = theirs[name]
        else:
            raise InputError(
                f"training.start_from={run.workdir}: its {name} has shape {theirs[name].shape}, this model's "
                f"{mine.shape}; give the model the same settings"
            )
    if not found:
        raise InputError(f"training.start_from={run.workdir}: no parameter of it has a name of this model")
    return found


def shared(params: Any, run: Run, labels: Sequence[str], say: Callable[[str], None] = print) -> Any:
    """Fresh parameters with those of another run in place of the ones that `matching` finds; the others stay fresh.

    Raises:
        InputError: as `matching` does.
    """
    found = matching(params, run, labels)
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    fresh = [name for name in names if name not in found and not name.startswith(f"{LORA}/")]
    fresh += ["the adapters"] if len(fresh) + len(found) < len(names) else []
    theirs = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(run.params)]
    left = [name for name in theirs if name not in found]
    said = [f"{len(found)} of {len(names)} parameter arrays"]
    said += [f"new are {', '.join(fresh)}"] if fresh else []
    said += [f"not taken are its {', '.join(left)}"] if left else []
    say(f"starting from {run.workdir}, step {run.step}: {'; '.join(said)}")

    def choose(path, mine):
        name = path_name(path)
        return jax.device_put(found[name], mine.sharding) if name in found else mine

    return jax.tree_util.tree_map_with_path(choose, params)
