"""The optimizer of a run: its schedule, its update rule, and the factor on the learning rate of every parameter."""

import dataclasses
import fnmatch
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llm.errors import InputError
from llm.training.roles import decay_mask, path_name, role, stacked
from llm.training.spec import OptimizerSpec
from llm.training.update_rules import scale_by_adafactor, scale_by_muon

# The matrices of the hidden layers.
MUON_ROLES = ("attention", "mlp", "expert", "recurrent")
# The matrices whose inputs grow with the model's width, but for the unembedding, whose logits the model itself scales.
WIDE_ROLES = ("attention", "mlp", "expert", "router")
# muP's share of the rate is for rules whose update of a number is as large as the rate, whatever the gradient.
CARRIED = ("adamw", "lion")


def schedule(spec: OptimizerSpec, updates: int) -> optax.Schedule:
    """The learning rate at update 0, 1, ...: linear from 0 to the peak, then as `spec.schedule` says.

    Raises:
        InputError: the warm-up does not end before the last update.
    """
    if spec.warmup_steps >= updates:
        raise InputError(f"optimizer.warmup_steps={spec.warmup_steps} must be less than training.steps={updates}")
    peak, warmup = spec.learning_rate, spec.warmup_steps
    end = peak * spec.final_fraction
    if spec.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0 if warmup else peak, peak, warmup, updates, end)
    after: dict[str, optax.Schedule] = {
        "linear": optax.linear_schedule(peak, end, updates - warmup),
        # The warm-up's updates come here too, counted from -warmup, and what is said of them is not taken.
        "inverse_sqrt": lambda update: peak * jnp.sqrt(warmup / (warmup + jnp.maximum(update, 0))),
        "constant": optax.constant_schedule(peak),
    }
    if spec.schedule == "wsd":
        decay = max(1, round(spec.decay_fraction * updates))
        if warmup + decay > updates:
            raise InputError(
                f"optimizer.warmup_steps={warmup} and the decay of the last {decay} updates "
                f"(optimizer.decay_fraction={spec.decay_fraction}) do not fit training.steps={updates}"
            )
        after["wsd"] = optax.linear_schedule(peak, end, decay, transition_begin=updates - warmup - decay)
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after[spec.schedule]], [warmup])


def build(spec: OptimizerSpec, updates: int, width_share: float = 1.0) -> optax.GradientTransformation:
    """The optimizer on the schedule of `updates` updates. Clipping is the train step's.

    Weight decay is decoupled in all of them: the learning rate times `weight_decay` times the parameter.

    Args:
        spec: its settings.
        updates: how many will be made.
        width_share: muP's share of the rate for matrices that widen with the model (`llm.models.width_share`).
    """
    rate = schedule(spec, updates)

    def rule(scale: optax.GradientTransformation) -> optax.GradientTransformation:
        return optax.chain(
            scale, optax.add_decayed_weights(spec.weight_decay, decay_mask), optax.scale_by_learning_rate(rate)
        )

    rules = {
        "adamw": rule(optax.scale_by_adam(spec.b1, spec.b2, spec.epsilon)),
        "adafactor": rule(scale_by_adafactor()),
        "lion": rule(optax.scale_by_lion(spec.b1, spec.b2)),
        "muon": rule(scale_by_muon(spec.momentum)),
        "frozen": optax.set_to_zero(),
    }

    def group(path, _) -> str:
        name = path_name(path)
        if factor_of(name, spec) == 0:
            return "frozen"
        return "adamw" if spec.name == "muon" and role(name).name not in MUON_ROLES else spec.name

    groups = [spec.name, *(["adamw"] if spec.name == "muon" else []), *(["frozen"] if freezes(spec) else [])]
    optimizer = rules[spec.name]
    if len(groups) > 1:
        optimizer = optax.partition(
            {name: rules[name] for name in groups}, lambda params: jax.tree_util.tree_map_with_path(group, params)
        )
    if not spec.rates and spec.layer_decay == 1 and width_share == 1:
        return optimizer
    scale = optax.stateless(
        lambda updates, _: jax.tree.map(jnp.multiply, updates, rate_factors(spec, updates, width_share))
    )
    return optax.chain(optimizer, scale)


def of_adapters(spec: OptimizerSpec) -> OptimizerSpec:
    """The same optimizer for a run with adapters: they are trained, and of the rest what `rates` names."""
    return dataclasses.replace(spec, rates=("*=0", "adapter=1", *spec.rates))


def freezes(spec: OptimizerSpec) -> bool:
    """Whether any parameter may be frozen."""
    return any(factor == 0 for _, factor in spec.factors())


def factor_of(path: str, spec: OptimizerSpec) -> float:
    """The factor that `spec.rates` puts on the learning rate of the parameter at a path: that of the last match."""
    factor = 1.0
    for name, number in spec.factors():
        if _matches(path, name):
            factor = number
    return factor


def _matches(path: str, name: str) -> bool:
    return fnmatch.fnmatchcase(path, name) if "*" in name else role(path).name == name


def rate_factors(spec: OptimizerSpec, params, width_share: float = 1.0):
    """The factor on the learning rate of each parameter, in the tree's own shape: a number, or one for each layer.

    A parameter of L layers has them in an array of shape (L, 1, ..., 1). `width_share` is that of `build`.
    """
    shapes = {path_name(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(params)}
    places = {path: _place(path) for path in shapes if stacked(path)}
    patterns: dict[str, int] = {}
    for stack, i in places.values():
        patterns[stack] = max(patterns.get(stack, 0), i + 1)
    layers = {stack: patterns[stack] * shapes[path][0] for path, (stack, _) in places.items()}

    def of(path, x):
        name = path_name(path)
        factor = factor_of(name, spec) * (width_share if role(name).name in WIDE_ROLES else 1.0)
        if name in places:
            stack, i = places[name]
            below = layers[stack] - np.arange(i, layers[stack], patterns[stack])
            factors = factor * spec.layer_decay**below
            return np.float32(factors).reshape(-1, *[1] * (x.ndim - 1))
        if name.startswith("embed"):
            factor *= spec.layer_decay ** (max(layers.values(), default=0) + 1)
        return np.float32(factor)

    return jax.tree_util.tree_map_with_path(of, params)


def _place(path: str) -> tuple[str, int]:
    """The stack that a layer's parameter belongs to, and its place in the stack's pattern (`llm.nn.stack`)."""
    stack, _, rest = path.partition("layers/")
    block = re.match(r"block_(\d+)/", rest)
    return stack, int(block[1]) if block else 0


def stop_frozen(spec: OptimizerSpec, params):
    """The parameters, through the frozen ones of which no gradient passes: it is exactly 0, and costs nothing."""
    if not freezes(spec):
        return params
    return jax.tree_util.tree_map_with_path(
        lambda path, x: jax.lax.stop_gradient(x) if factor_of(path_name(path), spec) == 0 else x, params
    )


def check_rates(spec: OptimizerSpec, params) -> None:
    """Raises InputError when a name in `optimizer.rates` matches no parameter, or nothing is left to train."""
    paths = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for name, _ in spec.factors():
        if not any(_matches(path, name) for path in paths):
            raise InputError(f"optimizer.rates: no parameter of this model is {name!r}; --show-parameters lists them")
    if all(factor_of(path, spec) == 0 for path in paths):
        raise InputError(f"optimizer.rates={spec.rates}: every parameter is frozen; leave one with a factor above 0")


def clip_by_norm(gradients, norm: jax.Array, limit: float | None):
    """Scales gradients of global norm `norm` down to `limit`; a norm of 0 stays 0."""
    if limit is None:
        return gradients
    factor = jnp.where(norm > limit, limit / jnp.where(norm > limit, norm, 1.0), 1.0)
    return jax.tree.map(lambda g: g * factor.astype(g.dtype), gradients)
