"""Making the device mesh of a run."""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils

from llm.errors import InputError
from llm.sharding.rules import RULES, mesh_axes
from llm.sharding.spec import AXES, MeshSpec


def request_cpu_devices(spec: MeshSpec) -> None:
    """Splits a CPU into the config's number of devices. Call before the first use of a device."""
    jax.config.update("jax_num_cpu_devices", spec.cpu_devices)


def make_mesh(spec: MeshSpec, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """The mesh over these devices, or all that there are, with the axes of `llm.sharding.AXES`.

    Raises:
        InputError: the config's sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    # A mesh axis may be part of an axis of a torus.
    placed = mesh_utils.create_device_mesh(spec.shape(len(devices)), devices, allow_split_physical_axes=True)
    return jax.sharding.Mesh(placed, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))


def batch_shards(mesh: jax.sharding.Mesh) -> int:
    """The number of parts that the rows of a batch are split into."""
    return math.prod(mesh.shape[axis] for axis in mesh_axes(RULES["batch"]))


def check_length(length: int, mesh: jax.sharding.Mesh) -> None:
    """Raises InputError when rows of this length cannot be shared equally by the devices of the context axis.

    Each takes two stripes of a row: a causal row's are one from its front and one from its end (`llm.sharding.ring`).
    """
    stripes = 2 * mesh.shape["context"]
    if mesh.shape["context"] > 1 and length % stripes:
        raise InputError(
            f"data.row_length={length} is not a multiple of {stripes}, two stripes for each of the "
            f"mesh.context={mesh.shape['context']} devices"
        )
