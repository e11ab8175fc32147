"""How the tests' programs are compiled: quickly, those that run a few times, or as users' programs are."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax


@functools.cache
def options() -> dict[str, Any]:
    """Compiler options for programs that run a few times: compiling takes a third of the time on a CPU."""
    if jax.default_backend() != "cpu":
        return {}
    found: dict[str, Any] = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
    try:
        jax.jit(lambda x: x + 1, compiler_options=found)(0.0)
    except jax.errors.JaxRuntimeError:  # not every jaxlib has the second
        del found["xla_cpu_use_fusion_emitters"]
    return found


def quick(function: Callable) -> Callable:
    """`jax.jit`, compiled quickly."""
    return jax.jit(function, compiler_options=options())


@contextlib.contextmanager
def optimized():
    """Inside, `jax.jit` compiles as it does for users."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)
