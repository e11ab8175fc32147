"""Making a parameter that knows the logical names of its axes."""

from collections.abc import Callable

import flax.linen as nn
import jax

from llm.nn.packed import Packed


def parameter(module: nn.Module, name: str, init: Callable, axes: tuple[str, ...], shape: tuple[int, ...]) -> jax.Array:
    """A float32 parameter of a module; `axes` are names of `llm.sharding.RULES`."""
    return module.param(name, nn.with_logical_partitioning(init, axes), shape)  # pyright: ignore[reportReturnType]


def matrix(
    module: nn.Module, name: str, init: Callable, axes: tuple[str, ...], shape: tuple[int, ...]
) -> jax.Array | Packed:
    """As `parameter`; or the same matrix packed, where that stands in its place."""
    if module.has_variable("params", name):
        found = module.get_variable("params", name)
        if isinstance(found, Packed):
            return found
    return parameter(module, name, init, axes, shape)
