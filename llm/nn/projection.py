"""Linear maps between axes."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm.nn.packed import Packed, product, products
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
        flat = self._flat(x)
        if isinstance(self.kernel, Packed):
            return self._shaped(x, product(flat.reshape(-1, self.fan_in), self.kernel).astype(self.dtype))
        return self._shaped(x, flat @ self.kernel.astype(self.dtype).reshape(self.fan_in, -1))

    def _flat(self, x: jax.Array) -> jax.Array:
        return x.astype(self.dtype).reshape(*x.shape[: x.ndim - len(self.inputs)], self.fan_in)

    def _shaped(self, x: jax.Array, flat: jax.Array) -> jax.Array:
        y = flat.reshape(*x.shape[: x.ndim - len(self.inputs)], *self.outputs)
        return y + self.shift.astype(self.dtype) if self.bias else y


def together(x: jax.Array, *projections: Projection) -> list[jax.Array]:
    """What each of some projections makes of x; packed ones are computed at once."""
    kernels = [one.kernel for one in projections]
    packed = [kernel for kernel in kernels if isinstance(kernel, Packed)]
    if len(packed) < len(kernels):
        return [one(x) for one in projections]
    flat = projections[0]._flat(x).reshape(-1, projections[0].fan_in)
    return [one._shaped(x, y.astype(one.dtype)) for one, y in zip(projections, products(flat, packed), strict=True)]
