"""LoRA: matrices of low rank beside frozen ones, merged into them before every use (Hu et al. 2021)."""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp

from llm.errors import InputError
from llm.training.roles import path_name, role, split_axes

# The part of a tree of parameters that holds the adapters, each at the path of its matrix: "lora/<path>/a" and "/b".
LORA = "lora"


@dataclasses.dataclass(frozen=True)
class Adapters:
    """A matrix W of one of the roles `targets` is used as W + alpha / rank * A B, in each layer by itself.

    Seen as (inputs, outputs), W has A of shape (inputs, rank) and B of (rank, outputs). Models know nothing of it:
    they are given the merged parameters.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]

    def create(self, params, key: jax.Array) -> dict[str, Any]:
        """Fresh adapters of parameters in their boxes, boxed too: A normal of deviation 1/sqrt(inputs), B zero.

        Raises:
            InputError: no matrix has a role of `targets`.
        """
        made = {}
        leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
        for i, (path, box) in enumerate(leaves):
            name = path_name(path)
            if role(name).name not in self.targets or not role(name).inputs:
                continue
            batch, inputs, outputs = split_axes(name, box.value.shape)
            layers, into, out = split_axes(name, box.names)
            a = jax.random.normal(jax.random.fold_in(key, i), (*batch, *inputs, self.rank)) * math.prod(inputs) ** -0.5
            made[f"{name}/a"] = nn.LogicallyPartitioned(a, (*layers, *into, "rank"))
            made[f"{name}/b"] = nn.LogicallyPartitioned(
                jnp.zeros((*batch, self.rank, *outputs)), (*layers, "rank", *out)
            )
        if not made:
            raise InputError(f"training.lora_targets={self.targets}: no matrix of this model has such a role")
        return flax.traverse_util.unflatten_dict(made, sep="/")

    def merge(self, params: dict[str, Any]) -> dict[str, Any]:
        """The model's parameters, from those with adapters beside them."""
        adapters = flax.traverse_util.flatten_dict(params[LORA], sep="/")

        def merge(path, w):
            name = path_name(path)
            beside = [adapters.get(f"{name}/{part}") for part in "ab"]
            return w if beside[0] is None else self.merged(name, w, *beside)

        return jax.tree_util.tree_map_with_path(merge, without(params))

    def merged(self, path: str, w, a, b) -> jax.Array:
        """One matrix of a path with its adapter."""
        batch, inputs, outputs = (math.prod(sizes) for sizes in split_axes(path, w.shape))
        a, b = a.reshape(batch, inputs, self.rank), b.reshape(batch, self.rank, outputs)
        product = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
        return w + self.alpha / self.rank * product.reshape(w.shape)


def without(params: dict[str, Any]) -> dict[str, Any]:
    """A tree of parameters without adapters."""
    return {name: part for name, part in params.items() if name != LORA}
