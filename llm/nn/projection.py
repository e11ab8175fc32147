"""Linear maps between axes."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm.nn.matmul import matmul
from llm.nn.packed import Packed, products
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

    def setup(self):
        init = nn.initializers.normal(self.stddev_scale * self.fan_in**-0.5)
        self.kernel = matrix(self, "kernel", init, self.axes, (*self.inputs, *self.outputs))
        if self.bias:
            shift = nn.initializers.zeros, self.axes[len(self.inputs) :], self.outputs
            self.shift = parameter(self, "bias", *shift)

    @property
    def fan_in(self) -> int:
        """Inputs of an output."""
        return math.prod(self.inputs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x of shape (batch, length, *inputs) to (batch, length, *outputs)."""
        # One plain matrix product: with more axes, XLA on CPU transposes operands of the gradient.
        if isinstance(self.kernel, Packed):
            return together(x, self)[0]
        rows = x.shape[: x.ndim - len(self.inputs)]
        kernel = self.kernel.astype(self.dtype).reshape(self.fan_in, -1)
        return _finished(self, rows, matmul(x.astype(self.dtype).reshape(*rows, self.fan_in), kernel))


def together(x: jax.Array, *projections: Projection) -> list[jax.Array]:
    """What each of some projections of the same inputs makes of x; packed kernels are multiplied with at once."""
    kernels = [one.kernel for one in projections]
    packed = [kernel for kernel in kernels if isinstance(kernel, Packed)]
    if len(packed) < len(kernels):
        return [one(x) for one in projections]
    first = projections[0]
    rows = x.shape[: x.ndim - len(first.inputs)]
    found = products(x.astype(first.dtype).reshape(-1, first.fan_in), packed)
    return [_finished(one, rows, flat) for one, flat in zip(projections, found, strict=True)]


def _finished(one: Projection, rows: tuple[int, ...], flat: jax.Array) -> jax.Array:
    y = flat.astype(one.dtype).reshape(*rows, *one.outputs)
    return y + one.shift.astype(one.dtype) if one.bias else y
