"""Making a parameter that knows the logical names of its axes."""

from collections.abc import Callable

import flax.linen as nn
import jax


def parameter(module: nn.Module, name: str, init: Callable, axes: tuple[str, ...], shape: tuple[int, ...]) -> jax.Array:
    """A float32 parameter of a module; `axes` are names of `llm.sharding.RULES`."""
    return module.param(name, nn.with_logical_partitioning(init, axes), shape)  # pyright: ignore[reportReturnType]
