"""How the tests' programs are compiled: quickly, those that run a few times, or as users' programs are."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax


def options() -> dict[str, Any]:
    """Compiler options for programs that run a few times on a CPU, beside what tests/conftest.py sets for all."""
    return {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else {}


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
