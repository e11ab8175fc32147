"""Logical axes: models name the axes of their arrays, this table places the names on the mesh."""

import math

import jax
from jax.sharding import PartitionSpec

Place = str | tuple[str, ...] | None

ACTIVATIONS: dict[str, Place] = {
    "batch": ("data", "fsdp", "expert"),
    "length": "context",
    "activation": None,
}
# The parameters' axes; some of them are axes of activations too.
RULES: dict[str, Place] = ACTIVATIONS | {
    "layers": None,
    "vocab": "tensor",
    "position": None,
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_width": None,
    "mlp": "tensor",
    "experts": "expert",
    "norm": None,
    "classes": None,
    "buckets": None,
    "gates": "tensor",
    "rank": None,
}


def mesh_axes(place: Place) -> tuple[str, ...]:
    """The mesh axes that a rule names."""
    return (place,) if isinstance(place, str) else place or ()


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


def free_axes() -> dict[str, int]:
    """The axes of the current mesh that split something and are not yet one device's own, with their sizes."""
    mesh = jax.sharding.get_abstract_mesh()
    return {name: size for name, size in mesh.shape.items() if size > 1 and name not in mesh.manual_axes}


def split(rule: str, *sizes: int) -> tuple[str, ...] | None:
    """The free axes that a rule splits these sizes over; None where there are none or they do not divide one."""
    free = free_axes()
    axes = tuple(axis for axis in mesh_axes(RULES[rule]) if axis in free)
    parts = math.prod(free[axis] for axis in axes)
    return axes if axes and all(size % parts == 0 for size in sizes) else None
