"""AdamW with a warm-up cosine schedule, and the table that says which parameters decay."""

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from llm.errors import InputError
from llm.training.spec import OptimizerSpec


class Role(NamedTuple):
    """What a parameter is for, and whether weight decay acts on it."""

    name: str
    decays: bool


# The first pattern found in a parameter's path decides. Vectors that scale or shift do not decay; matrices do.
ROLES: tuple[tuple[str, Role], ...] = (
    (r"norm/(scale|bias)$", Role("norm", False)),
    (r"(/(\w+_)?|^logit_)bias$", Role("bias", False)),
    (r"^(encoder|decoder)_bias/table$", Role("position bias", False)),
    (r"^embed\w*/table$", Role("embedding", True)),
    (r"/(cross_)?attention/(query|key|value|output)/kernel$", Role("attention", True)),
    (r"/mlp/(gate|up|down)/kernel$", Role("mlp", True)),
    (r"/moe/(gate|up|down)$", Role("expert", True)),
    (r"/moe/router$", Role("router", True)),
    (r"/cell/\w+_(input|recurrent)_kernel$", Role("recurrent", True)),
    (r"^(mask_head/transform|pooler|next_sentence_head|span_head|class_head/output)/kernel$", Role("head", True)),
    (r"^class_head/bag/kernel$", Role("bag of words", True)),
    (r"^unembedding_projection/kernel$", Role("unembedding", True)),
)


def path_name(path) -> str:
    """A parameter's path, "stack/layers/mlp/up/kernel"."""
    return "/".join(str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey))


def role(path: str) -> Role:
    """The role of the parameter at a path.

    Raises:
        ValueError: no pattern of ROLES covers it.
    """
    for pattern, found in ROLES:
        if re.search(pattern, path):
            return found
    raise ValueError(f"parameter {path} has no role: add a pattern to llm.training.optimizer.ROLES")


def decay_mask(params):
    """True for every parameter that decays, in the tree's own shape."""
    return jax.tree_util.tree_map_with_path(lambda path, _: role(path_name(path)).decays, params)


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
        "inverse_sqrt": lambda update: peak * jnp.sqrt(warmup / (warmup + update)),
        "constant": optax.constant_schedule(peak),
    }
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after[spec.schedule]], [warmup])


def build(spec: OptimizerSpec, updates: int) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter 2019) on the schedule of `updates` updates. Clipping is the train step's."""
    return optax.adamw(
        schedule(spec, updates),
        b1=spec.b1,
        b2=spec.b2,
        eps=spec.epsilon,
        weight_decay=spec.weight_decay,
        mask=decay_mask,
    )


def clip_by_norm(gradients, norm: jax.Array, limit: float | None):
    """Scales gradients of global norm `norm` down to `limit`; a norm of 0 stays 0."""
    if limit is None:
        return gradients
    factor = jnp.where(norm > limit, limit / jnp.where(norm > limit, norm, 1.0), 1.0)
    return jax.tree.map(lambda g: g * factor.astype(g.dtype), gradients)
