"""The device that a call is compiled for: what `auto` and the tables of block sizes go by."""

import contextlib
import dataclasses
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Target:
    """A device.

    Attributes:
        platform: "cpu", "gpu" or "tpu".
        kind: its name in JAX's words, as "TPU v5 lite" or "NVIDIA H100 80GB HBM3".
        capability: the compute capability of an NVIDIA GPU, as "9.0"; else None.
        cores: multiprocessors of a GPU; else None.
        interpret: False for compiled kernels, True for Pallas's interpreter, or the parameters of another one.
    """

    platform: str
    kind: str
    capability: str | None = None
    cores: int | None = None
    interpret: Any = False


_chosen: list[Target] = []


def target() -> Target:
    """The device of the innermost `compiling_for`, or else this process's first."""
    if _chosen:
        return _chosen[-1]
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", None)
    return Target(device.platform, device.device_kind, capability, getattr(device, "core_count", None))


@contextlib.contextmanager
def compiling_for(platform: str, kind: str, **more):
    """What is traced and lowered inside is for another device than this process has.

    For ahead-of-time compilation and interpreters; the arguments are the attributes of `Target`.
    """
    _chosen.append(Target(platform, kind, **more))
    try:
        with _known_to_pallas(_chosen[-1]):
            yield
    finally:
        _chosen.pop()


def _known_to_pallas(device: Target):
    """Pallas asks for the generation of a TPU while lowering; it finds it in the mesh, if that is of other devices."""
    if device.platform != "tpu" or device.interpret or not jax.sharding.get_abstract_mesh().empty:
        return contextlib.nullcontext()
    described = jax.sharding.AbstractDevice(device.kind, num_cores=1, platform="tpu")
    axes: dict[str, Any] = dict(axis_types=(jax.sharding.AxisType.Auto,), abstract_device=described)
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("device",), **axes))
