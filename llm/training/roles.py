"""What every parameter is for: whether it decays, which of its axes make a matrix, and how it is named."""

import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Role(NamedTuple):
    """What a parameter is for.

    Attributes:
        name: of the role.
        decays: whether weight decay acts on it.
        inputs: of a matrix, how many of its axes are contracted with what it is applied to; 0 is no matrix.
    """

    name: str
    decays: bool
    inputs: int = 0


# The first pattern found in a parameter's path decides. Vectors that scale or shift do not decay; matrices do.
ROLES: tuple[tuple[str, Role], ...] = (
    (r"^lora/.*attention/output/kernel/a$", Role("adapter", True, 2)),
    (r"^lora/", Role("adapter", True, 1)),
    (r"norm/(scale|bias)$", Role("norm", False)),
    (r"(/(\w+_)?|^logit_)bias$", Role("bias", False)),
    (r"^(encoder|decoder)_bias/table$", Role("position bias", False)),
    (r"^embed\w*/table$", Role("embedding", True, 1)),
    (r"/(cross_)?attention/(query|key|value)/kernel$", Role("attention", True, 1)),
    (r"/(cross_)?attention/output/kernel$", Role("attention", True, 2)),
    (r"/mlp/(gate|up|down)/kernel$", Role("mlp", True, 1)),
    (r"/moe/(gate|up|down)$", Role("expert", True, 1)),
    (r"/moe/router$", Role("router", True, 1)),
    (r"/cell/\w+_(input|recurrent)_kernel$", Role("recurrent", True, 1)),
    (r"^(mask_head/transform|pooler|next_sentence_head|span_head|class_head/output)/kernel$", Role("head", True, 1)),
    (r"^class_head/bag/kernel$", Role("bag of words", True, 1)),
    (r"^unembedding_projection/kernel$", Role("unembedding", True, 1)),
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
    raise ValueError(f"parameter {path} has no role: add a pattern to llm.training.roles.ROLES")


def role_names() -> list[str]:
    """The names of all roles."""
    return list(dict.fromkeys(found.name for _, found in ROLES))


def decay_mask(params):
    """True for every parameter that decays, in the tree's own shape."""
    return jax.tree_util.tree_map_with_path(lambda path, _: role(path_name(path)).decays, params)


def norms_by_role(params) -> dict[str, jax.Array]:
    """The norm of all parameters of a role together, by its name with _ for spaces."""
    squares: dict[str, jax.Array] = {}
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        name = role(path_name(path)).name.replace(" ", "_")
        squares[name] = jnp.square(x).sum() + squares.get(name, 0.0)
    return {name: jnp.sqrt(square) for name, square in squares.items()}


def stacked(path: str) -> bool:
    """Whether a parameter has a leading axis over layers."""
    return "layers" in path.split("/")


def split_axes(path: str, shape: tuple) -> tuple[tuple, tuple, tuple]:
    """A parameter's sizes (or names of axes) apart: those over layers and experts, a matrix's inputs, and the rest.

    An attention's query kernel of shape (L, D, N, H) gives ((L,), (D,), (N, H)), its output's (L, N, H, D) gives
    ((L,), (N, H), (D,)); a norm's scale (L, D) gives ((L,), (), (D,)).
    """
    batch = stacked(path) + bool(re.search(r"/moe/(gate|up|down)(/|$)", path))
    inputs = batch + role(path).inputs
    return shape[:batch], shape[batch:inputs], shape[inputs:]


def as_matrices(path: str, x: Any) -> Any:
    """A parameter as the matrices of its layers and experts, (matrices, inputs, outputs).

    What is no matrix has one input: a vector of each layer, (layers, 1, size).
    """
    batch, inputs, outputs = split_axes(path, x.shape)
    return x.reshape(math.prod(batch), math.prod(inputs), math.prod(outputs))
