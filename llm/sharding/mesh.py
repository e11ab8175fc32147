"""Making the device mesh of a run."""

import jax

from llm.sharding.spec import AXES, MeshSpec


def request_cpu_devices(spec: MeshSpec) -> None:
    """Splits a CPU into the config's number of devices. Call before the first use of a device."""
    jax.config.update("jax_num_cpu_devices", spec.cpu_devices)


def make_mesh(spec: MeshSpec) -> jax.sharding.Mesh:
    """The mesh over all devices, with the axes of `llm.sharding.AXES`.

    Raises:
        InputError: the config's sizes do not multiply to the number of devices.
    """
    auto = (jax.sharding.AxisType.Auto,) * len(AXES)
    return jax.make_mesh(spec.shape(jax.device_count()), AXES, axis_types=auto)


def batch_shards(mesh: jax.sharding.Mesh) -> int:
    """The number of parts that the rows of a batch are split into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]
