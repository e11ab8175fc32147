"""Normalisation over the last axis, with float32 statistics whatever the compute dtype."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm.nn.parameter import parameter


class Norm(nn.Module):
    """RMS norm ("rms": no mean, no bias; Zhang and Sennrich 2019) or layer norm ("layer"; Ba et al. 2016)."""

    kind: str = "rms"
    epsilon: float = 1e-6
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x of shape (..., width) to the same shape in `dtype`."""
        width = x.shape[-1]
        scale = parameter(self, "scale", nn.initializers.ones, ("norm",), (width,))
        x = x.astype(jnp.float32)
        if self.kind == "layer":
            x = x - x.mean(-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.epsilon) * scale
        if self.kind == "layer":
            x += parameter(self, "bias", nn.initializers.zeros, ("norm",), (width,))
        return x.astype(self.dtype)
