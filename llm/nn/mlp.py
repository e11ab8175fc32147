"""The feed-forward part of a block."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm.nn.projection import Projection, together
from llm.sharding import constrain

ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "silu": jax.nn.silu,
}


class MLP(nn.Module):
    """Two linear maps with an activation between; gated ones multiply it with a third map (Shazeer 2020).

    Attributes:
        ff_width: F.
        activation: a key of ACTIVATIONS.
        output_scale: factor on the initial standard deviation of the output projection.
    """

    ff_width: int
    activation: str = "gelu"
    gated: bool = False
    bias: bool = False
    output_scale: float = 1.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BTD: jax.Array, drop: Callable[[jax.Array], jax.Array] = lambda h: h) -> jax.Array:
        """y_BTD; `drop` acts on the hidden layer."""
        width = x_BTD.shape[-1]

        names = ("gate", "up") if self.gated else ("up",)
        axes = ("embed", "mlp")
        parts = [Projection((width,), (self.ff_width,), axes, self.bias, dtype=self.dtype, name=name) for name in names]
        first, *rest = together(x_BTD, *parts)
        h_BTF = ACTIVATIONS[self.activation](first)
        if self.gated:
            h_BTF *= rest[0]
        h_BTF = constrain(drop(h_BTF), "batch", "length", "mlp")
        return Projection(
            (self.ff_width,), (width,), ("mlp", "embed"), self.bias, self.output_scale, self.dtype, name="down"
        )(h_BTF)
