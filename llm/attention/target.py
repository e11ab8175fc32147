"""The device that a call is compiled for: what `auto` and the tables of block sizes go by."""

import contextlib
import dataclasses
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Target:
    """A device: platform "cpu", "gpu" or "tpu"; its kind in JAX's words; how Pallas kernels run.

    `interpret` is False for compiled kernels, True for Pallas's interpreter, or the parameters of another one.
    """

    platform: str
    kind: str
    interpret: Any = False


_chosen: list[Target] = []


def target() -> Target:
    """The device of the innermost `compiling_for`, or else this process's first."""
    if _chosen:
        return _chosen[-1]
    device = jax.devices()[0]
    return Target(device.platform, device.device_kind)


@contextlib.contextmanager
def compiling_for(platform: str, kind: str, interpret: Any = False):
    """Calls traced inside are for another device than this process has (ahead-of-time compilation, interpreters)."""
    _chosen.append(Target(platform, kind, interpret))
    try:
        yield
    finally:
        _chosen.pop()
