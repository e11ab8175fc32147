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
    (r"/bias$", Role("bias", False)),
    (r"^embed\w*/table$", Role("embedding", True)),
    (r"/attention/(query|key|value|output)/kernel$", Role("attention", True)),
    (r"/mlp/(gate|up|down)/kernel$", Role("mlp", True)),
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
    """The learning rate at update 0, 1, ...: linear from 0 to the peak, cosine down to the final share, then constant.

    Raises:
        InputError: the warm-up does not end before the last update.
    """
    if spec.warmup_steps >= updates:
        raise InputError(f"optimizer.warmup_steps={spec.warmup_steps} must be less than training.steps={updates}")
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if spec.warmup_steps else spec.learning_rate,
        peak_value=spec.learning_rate,
        warmup_steps=spec.warmup_steps,
        decay_steps=updates,
        end_value=spec.learning_rate * spec.final_fraction,
    )


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
