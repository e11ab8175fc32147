"""Logical axes: models name the axes of their arrays, this table places the names on the mesh."""

import jax
from jax.sharding import PartitionSpec

RULES: dict[str, str | tuple[str, ...] | None] = {
    # activations
    "batch": ("data", "fsdp"),
    "length": "context",
    "activation": None,
    # parameters
    "layers": None,
    "vocab": "tensor",
    "position": None,
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_width": None,
    "mlp": "tensor",
    "experts": None,
    "norm": None,
    "classes": None,
    "buckets": None,
    "gates": "tensor",
    "rank": None,
}


def partition_spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """The place of an array on the mesh from the logical names of its axes; None is not split.

    Raises:
        ValueError: a name that RULES does not have.
    """
    unknown = [axis for axis in axes if axis is not None and axis not in RULES]
    if unknown:
        raise ValueError(f"logical axis {unknown[0]!r} has no rule; there are {', '.join(RULES)}")
    return PartitionSpec(*(None if axis is None else RULES[axis] for axis in axes))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Asks for x to lie on the current mesh (`jax.set_mesh`) by its logical axes; without a mesh, returns x."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes))
