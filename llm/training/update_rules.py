"""The update rules that see parameters as matrices: Adafactor and Muon, as optax transformations.

Parameters are stacked over layers, and projections have an axis for heads. Both rules are published for the matrices of
single layers, so each parameter is taken apart into those (`llm.training.roles.as_matrices`).
"""

import math
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import optax

from llm.training.roles import as_matrices, path_name, role, split_axes

# Adafactor's constants (Shazeer and Stern 2018, and the T5 of Raffel et al. 2020).
_DECAY = 0.8  # second moments decay by 1 - t^-0.8 at update t
_SQUARE_EPSILON = 1e-30
_CLIP = 1.0  # largest root mean square of an update
_SMALLEST_SCALE = 1e-3  # of a parameter, so that one that starts at 0 can leave it
_SMALLEST_FACTORED = 128  # a matrix with a shorter side keeps its second moments whole
# Newton-Schulz (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).
_QUINTIC = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


class AdafactorState(NamedTuple):
    """Updates made, and by parameter the second moments: "row" and "column" of each matrix, or "full"."""

    count: jax.Array
    moments: Any


def scale_by_adafactor() -> optax.GradientTransformation:
    """Gradients as Adafactor scales them, without momentum, as T5 was trained (Shazeer and Stern 2018, algorithm 4).

    Divided by the root of the second moments, which a matrix keeps as the means of its rows and columns; clipped to a
    root mean square of 1; times the root mean square of the parameter, so that a learning rate is relative. Each
    matrix and vector of a layer is scaled by itself. The moments lie on every device.
    """

    def init(params):
        moments = {}
        for path, x in jax.tree_util.tree_leaves_with_path(params):
            name = path_name(path)
            batch, inputs, outputs = (math.prod(sizes) for sizes in split_axes(name, x.shape))
            if role(name).inputs and min(inputs, outputs) >= _SMALLEST_FACTORED:
                shapes = {"row": (batch, inputs, 1), "column": (batch, 1, outputs)}
            else:
                shapes = {"full": (batch, inputs, outputs)}
            moments[name] = {key: jnp.zeros(shape, jnp.float32) for key, shape in shapes.items()}
        return AdafactorState(jnp.zeros((), jnp.int32), flax.traverse_util.unflatten_dict(moments, sep="/"))

    def rms(x):
        return jnp.sqrt(jnp.square(x).mean((1, 2), keepdims=True))

    def update(updates, state, params=None):
        count = state.count + 1
        decay = 1.0 - count.astype(jnp.float32) ** -_DECAY
        old, new = flax.traverse_util.flatten_dict(state.moments, sep="/"), {}

        def scale(path, gradient, parameter):
            name = path_name(path)
            g = as_matrices(name, gradient)
            square = jnp.square(g) + _SQUARE_EPSILON

            def moment(key: str, value):
                new[f"{name}/{key}"] = mixed = decay * old[f"{name}/{key}"] + (1 - decay) * value
                return mixed

            if f"{name}/row" in old:
                row, column = (
                    moment("row", square.mean(2, keepdims=True)),
                    moment("column", square.mean(1, keepdims=True)),
                )
                u = g * jax.lax.rsqrt(row / row.mean(1, keepdims=True)) * jax.lax.rsqrt(column)
            else:
                u = g * jax.lax.rsqrt(moment("full", square))
            u = u / jnp.maximum(1.0, rms(u) / _CLIP)
            return (u * jnp.maximum(rms(as_matrices(name, parameter)), _SMALLEST_SCALE)).reshape(gradient.shape)

        scaled = jax.tree_util.tree_map_with_path(scale, updates, params)
        return scaled, AdafactorState(count, flax.traverse_util.unflatten_dict(new, sep="/"))

    return optax.GradientTransformation(init, update)


def orthogonalize(x: jax.Array) -> jax.Array:
    """Matrices of shape (..., inputs, outputs) with all singular values moved near 1, by five Newton-Schulz steps."""
    a, b, c = _QUINTIC
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-7)
    for _ in range(_ITERATIONS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x if wide else x.mT


def scale_by_muon(momentum: float) -> optax.GradientTransformation:
    """Gradients of matrices as Muon scales them (Jordan et al. 2024): Nesterov momentum, made orthogonal.

    The matrices of each layer and expert by themselves, in float32, times sqrt(outputs / inputs) where that is above 1.
    """

    def init(params):
        return optax.TraceState(jax.tree.map(jnp.zeros_like, params))

    def update(updates, state, params=None):
        del params

        def average(old, new):
            return momentum * old + (1 - momentum) * new

        def scale(path, ahead):
            matrices = as_matrices(path_name(path), ahead)
            _, inputs, outputs = matrices.shape
            return (orthogonalize(matrices) * max(1.0, outputs / inputs) ** 0.5).reshape(ahead.shape)

        trace = jax.tree.map(average, state.trace, updates)
        ahead = jax.tree.map(average, trace, updates)
        return jax.tree_util.tree_map_with_path(scale, ahead), optax.TraceState(trace)

    return optax.GradientTransformation(init, update)
