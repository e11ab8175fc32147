"""The train state: everything that a step changes and a checkpoint keeps.

All that is drawn at random in a run comes from the config's `seed`, and from nothing that a mesh, a host or a restart
changes:

    parameters      the first half of key(seed), by the module's path (linen); adapters fold in 1 and their place
    dropout         the second half, `rng`, with the step, the micro-batch and the part (a head, a side of a pair)
                    folded in; linen adds the module's path, attention row, head and places (`attention.dropout`)
    order of rows   seed and epoch (`data.loader`); a mixture of sources takes its turns by weight, without a draw
    what an objective draws of a row (masks, spans, where a prefix ends): seed, epoch and row; in validations seed 0
    samples         key(seed) with the row folded in, and then the place of the token (`generation.engine`)
    intervals       numpy's default_rng(0) (`evaluation.bootstrap`)

A step depends on the step's number alone, so a resumed run draws what one that was never stopped draws.
"""

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding

from llm.errors import InputError
from llm.models import Model, width_share
from llm.sharding import ACTIVATIONS, RULES, mesh_axes, partition_spec
from llm.training.adapters import LORA, Adapters
from llm.training.losses import OBJECTIVES
from llm.training.optimizer import rate_factors
from llm.training.roles import path_name, role
from llm.training.spec import OptimizerSpec


@flax.struct.dataclass
class TrainState:
    """State after `step` steps.

    Attributes:
        step: batches consumed, which is the place in the data.
        skipped: those of them whose gradient was not finite; the optimizer has made step - skipped updates.
        skipped_in_a_row: how many of the last steps were skipped without a break.
        rng: the key that every step's dropout is derived from, by folding in the step.
        carry: of a model that carries a state, the one after the last batch; None of others.
        ema: the exponential moving average of `params`, where one is kept; else None.
    """

    step: jax.Array
    skipped: jax.Array
    skipped_in_a_row: jax.Array
    params: Any
    opt_state: Any
    rng: jax.Array
    carry: Any = None
    ema: Any = None


def saved(state: TrainState) -> dict[str, Any]:
    """A state by the names of its fields, as a checkpoint holds it; without an average where none is kept."""
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return {name: value for name, value in fields.items() if name != "ema" or value is not None}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a state is made of.

    Attributes:
        model, optimizer: of the run.
        objective: a key of `llm.training.losses.OBJECTIVES`: which parts of the model have parameters.
        seed: of the parameters and of dropout.
        batch_size: rows of a batch, which a carried state needs.
        adapters: beside the parameters, under "lora"; None has none.
        ema_decay: of a moving average of the parameters; None keeps none.
    """

    model: Model
    optimizer: optax.GradientTransformation
    objective: str = "causal"
    seed: int = 0
    batch_size: int = 1
    adapters: Adapters | None = None
    ema_decay: float | None = None

    def create(self, unbox) -> TrainState:
        """A fresh state; its parameters pass through `unbox`."""
        init_key, rng = jax.random.split(jax.random.key(self.seed))
        ones = jnp.ones((1, 1), jnp.int32)
        batch = {name: ones for name in ("segments", "source_segments")}
        batch |= {name: ones * 0 for name in ("tokens", "positions", "types", "source_tokens", "source_positions")}
        touch = OBJECTIVES[self.objective].touch
        params = self.model.init(init_key, method=lambda module: touch(module, batch))["params"]
        if self.adapters is not None:
            params = params | {LORA: self.adapters.create(params, jax.random.fold_in(init_key, 1))}
        params = unbox(params)
        zero = jnp.zeros((), jnp.int32)
        carry = self.model.init_cache(self.batch_size, 0) if self.model.carries else None
        ema = None if self.ema_decay is None else jax.tree.map(jnp.copy, params)
        return TrainState(zero, zero, zero, params, self.optimizer.init(params), rng, carry, ema)

    def model_params(self, state: TrainState):
        """The parameters that the model is judged and used with: the average where one is kept, adapters merged."""
        params = state.params if state.ema is None else state.ema
        return params if self.adapters is None else jax.jit(self.adapters.merge)(params)

    def boxed(self) -> TrainState:
        """The state's shapes, each parameter (and each moment of one) in the box that names its logical axes.

        Raises:
            ValueError: a parameter of the model has no box.
        """
        return self._boxed

    @functools.cached_property
    def _boxed(self) -> TrainState:
        # Kept: it takes a trace of the whole model, and a run asks half a dozen times.
        found = jax.eval_shape(lambda: self.create(unbox=lambda params: params))
        for path, x in jax.tree_util.tree_leaves_with_path(found.params, is_leaf=_is_box):
            if not _is_box(x):
                raise ValueError(
                    f"parameter {path_name(path)} does not name its axes, so nothing says how it is split: make it by "
                    "llm.nn.parameter.parameter, not by self.param"
                )
        return found


def _is_box(x) -> bool:
    return isinstance(x, nn.LogicallyPartitioned)


def state_shardings(recipe: Recipe, mesh: jax.sharding.Mesh) -> TrainState:
    """The place of every array of the state on the mesh: that of its logical axes, all devices for the rest."""

    def place(x):
        if not _is_box(x):
            return NamedSharding(mesh, partition_spec(()))
        # A frozen parameter's moments are an empty node in its box.
        return jax.tree.map(lambda _: NamedSharding(mesh, partition_spec(x.names)), x.value)

    return jax.tree.map(place, recipe.boxed(), is_leaf=_is_box)


# What splits only some models: the mesh axis, and the logical axis of a parameter that those have.
_SPLITS = {"context": "heads", "expert": "experts"}


def check_mesh(recipe: Recipe, mesh: jax.sharding.Mesh) -> None:
    """Refuses a mesh that does not fit the model's parameters.

    Raises:
        InputError: an axis of a parameter cannot be split over its mesh axes into equal parts; or a mesh axis has
            nothing to split in this model: `expert` without experts, `context` without attention.
    """
    found = set()
    for path, box in jax.tree_util.tree_leaves_with_path(recipe.boxed().params, is_leaf=_is_box):
        found |= set(box.names)
        for size, logical, place in zip(box.value.shape, box.names, partition_spec(box.names)):
            axes = mesh_axes(place)
            parts = math.prod(mesh.shape[axis] for axis in axes)
            if size % parts:
                raise InputError(
                    f"mesh: {path_name(path)} has {size} along its {logical} axis, "
                    f"which the {parts} parts of {'+'.join(axes)} do not divide"
                )
    for axis, logical in _SPLITS.items():
        if mesh.shape[axis] > 1 and logical not in found:
            raise InputError(
                f"mesh.{axis}={mesh.shape[axis]}: this model has no {logical} for it to split; set it to 1, and "
                "mesh.data splits the rows"
            )


def create(recipe: Recipe, mesh: jax.sharding.Mesh) -> TrainState:
    """A fresh state, made where it belongs on the mesh."""
    return jax.jit(lambda: recipe.create(unbox=nn.unbox), out_shardings=state_shardings(recipe, mesh))()


def abstract(recipe: Recipe, mesh: jax.sharding.Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state without its values: the target of a restore."""
    # Not nn.unbox, which under a mesh constrains what it takes out, and shapes cannot be.
    shapes = jax.tree.map(lambda x: x.value if _is_box(x) else x, recipe.boxed(), is_leaf=_is_box)
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, state_shardings(recipe, mesh)
    )


def count_parameters(params) -> int:
    """The number of trained numbers."""
    return sum(x.size for x in jax.tree.leaves(params))


def _rate(factor: np.ndarray) -> str:
    low, high = float(factor.min()), float(factor.max())
    return "frozen" if high == 0 else f"{low:.3g}" if low == high else f"{low:.3g}..{high:.3g}"


def parameter_table(recipe: Recipe, spec: OptimizerSpec) -> str:
    """A readable table of all parameters: shape, role, factor on the learning rate (from the lowest layer's to the
    highest's), whether it decays, logical axes and their mesh axes.
    """
    boxed = recipe.boxed().params
    factors = jax.tree.leaves(rate_factors(spec, nn.unbox(boxed), width_share(recipe.model.spec)))
    rows = [("parameter", "shape", "role", "rate", "decay", "logical axes", "mesh axes")]
    for (path, box), factor in zip(jax.tree_util.tree_leaves_with_path(boxed, is_leaf=_is_box), factors):
        x, logical = box.value, box.names
        name, places = path_name(path), tuple("+".join(mesh_axes(place)) or "-" for place in partition_spec(logical))
        found = role(name)
        rows.append(
            (name, "x".join(map(str, x.shape)), found.name, _rate(factor),
             "yes" if found.decays and factor.any() else "no",
             " ".join(logical), " ".join(places))
        )  # fmt: skip
    return f"{_aligned(rows)}\n{count_parameters(boxed):,} parameters"


def rule_table(recipe: Recipe) -> str:
    """A readable table of the rules: the mesh axes of each logical axis, and the model's parameters that have it."""
    leaves = jax.tree_util.tree_leaves_with_path(recipe.boxed().params, is_leaf=_is_box)
    rows = [("logical axis", "mesh axes", "covers")]
    for logical, place in RULES.items():
        covered = [path_name(path) for path, box in leaves if logical in box.names]
        kind = "activations" if logical in ACTIVATIONS else "no parameter of this model"
        rows.append((logical, "+".join(mesh_axes(place)) or "-", ", ".join(covered) or kind))
    return _aligned(rows)


def _aligned(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    return "\n".join("  ".join([*(f"{cell:<{w}}" for cell, w in zip(row, widths)), row[-1]]).rstrip() for row in rows)
