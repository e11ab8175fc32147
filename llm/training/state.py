"""The train state: everything that a step changes and a checkpoint keeps."""

import math
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from llm.errors import InputError
from llm.models import Model
from llm.sharding import partition_spec
from llm.training.optimizer import path_name, role


@flax.struct.dataclass
class TrainState:
    """State after `step` steps.

    Attributes:
        step: batches consumed, which is the place in the data.
        skipped: those of them whose gradient was not finite; the optimizer has made step - skipped updates.
        skipped_in_a_row: how many of the last steps were skipped without a break.
        rng: the key that every step's dropout is derived from, by folding in the step.
    """

    step: jax.Array
    skipped: jax.Array
    skipped_in_a_row: jax.Array
    params: Any
    opt_state: Any
    rng: jax.Array


def _create(model: Model, optimizer: optax.GradientTransformation, seed: int, unbox) -> TrainState:
    init_key, rng = jax.random.split(jax.random.key(seed))

    def everything(module):
        tokens = jnp.zeros((1, 1), jnp.int32)
        return module.unembed(module({"tokens": tokens}).hidden_BTD)

    params = unbox(model.init(init_key, method=everything)["params"])
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, zero, zero, params, optimizer.init(params), rng)


def _boxed(model: Model, optimizer: optax.GradientTransformation) -> TrainState:
    """The state's shapes, each parameter (and each moment of one) in the box that names its logical axes."""
    return jax.eval_shape(lambda: _create(model, optimizer, 0, unbox=lambda params: params))


def _is_box(x) -> bool:
    return isinstance(x, nn.LogicallyPartitioned)


def state_shardings(model: Model, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh) -> TrainState:
    """The place of every array of the state on the mesh: that of its logical axes, all devices for scalars."""
    return jax.tree.map(
        lambda x: NamedSharding(mesh, partition_spec(x.names if _is_box(x) else ())),
        _boxed(model, optimizer),
        is_leaf=_is_box,
    )


def check_mesh(model: Model, mesh: jax.sharding.Mesh) -> None:
    """Raises InputError when an axis of a parameter cannot be split over its mesh axes into equal parts."""
    for path, box in jax.tree_util.tree_leaves_with_path(_boxed(model, optax.identity()).params, is_leaf=_is_box):
        for size, logical, axes in zip(box.value.shape, box.names, partition_spec(box.names)):
            parts = math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ()))
            if size % parts:
                raise InputError(
                    f"mesh: {path_name(path)} has {size} along its {logical} axis, "
                    f"which the {parts} parts of {axes} do not divide"
                )


def create(model: Model, optimizer: optax.GradientTransformation, seed: int, mesh: jax.sharding.Mesh) -> TrainState:
    """A fresh state, made where it belongs on the mesh."""
    places = state_shardings(model, optimizer, mesh)
    return jax.jit(lambda: _create(model, optimizer, seed, unbox=nn.unbox), out_shardings=places)()


def abstract(model: Model, optimizer: optax.GradientTransformation, seed: int, mesh: jax.sharding.Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state without its values: the target of a restore."""
    shapes = jax.eval_shape(lambda: _create(model, optimizer, seed, unbox=nn.unbox))
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        shapes,
        state_shardings(model, optimizer, mesh),
    )


def count_parameters(params) -> int:
    """The number of trained numbers."""
    return sum(x.size for x in jax.tree.leaves(params))


def parameter_table(model: Model) -> str:
    """A readable table of all parameters: shape, role, whether it decays, logical axes and their mesh axes."""
    boxed = _boxed(model, optax.identity()).params
    rows = [("parameter", "shape", "role", "decay", "logical axes", "mesh axes")]
    for path, box in jax.tree_util.tree_leaves_with_path(boxed, is_leaf=_is_box):
        x, logical = box.value, box.names
        name, places = path_name(path), tuple(str(place or "-") for place in partition_spec(logical))
        found = role(name)
        rows.append(
            (name, "x".join(map(str, x.shape)), found.name, "yes" if found.decays else "no",
             " ".join(logical), " ".join(places))
        )  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join([*lines, f"{count_parameters(boxed):,} parameters"])
