"""Linear maps between axes."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm.nn.packed import Packed, product
from llm.nn.parameter import matrix, parameter


class Projection(nn.Module):
    """A linear map from the last `len(inputs)` axes of x to new axes.

    Attributes:
        inputs, outputs: sizes of the axes that are contracted and that are made.
        axes: the logical names of the kernel's axes, inputs first.
        stddev_scale: factor on the initial standard deviation, 1/sqrt(inputs).
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    axes: tuple[str, ...]
    bias: bool = False
    stddev_scale: float = 1.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x of shape (batch, length, *inputs) to (batch, length, *outputs)."""
        fan_in = 1
        for size in self.inputs:
            fan_in *= size
        init = nn.initializers.normal(self.stddev_scale * fan_in**-0.5)
        kernel = matrix(self, "kernel", init, self.axes, (*self.inputs, *self.outputs))
        n = len(self.inputs)
        # One plain matrix product: with more axes, XLA on CPU transposes operands of the gradient.
        flat = x.astype(self.dtype).reshape(*x.shape[: x.ndim - n], fan_in)
        if isinstance(kernel, Packed):
            flat = product(flat.reshape(-1, fan_in), kernel).astype(self.dtype)
        else:
            flat = flat @ kernel.astype(self.dtype).reshape(fan_in, -1)
        y = flat.reshape(*x.shape[: x.ndim - n], *self.outputs)
        if self.bias:
            y += parameter(self, "bias", nn.initializers.zeros, self.axes[n:], self.outputs).astype(self.dtype)
        return y
