"""Recurrent layers: LSTM, GRU and the vanilla cell over time, one direction or both."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm.nn.parameter import parameter
from llm.sharding import constrain

State = tuple[jax.Array, ...]  # of one layer, each (B, H); the first is the output


def _lstm(x: jax.Array, h: jax.Array, state: State) -> State:
    i, f, g, o = jnp.split(x + h, 4, axis=-1)
    c = jax.nn.sigmoid(f) * state[1] + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


def _gru(x: jax.Array, h: jax.Array, state: State) -> State:
    (xr, xz, xn), (hr, hz, hn) = jnp.split(x, 3, axis=-1), jnp.split(h, 3, axis=-1)
    z = jax.nn.sigmoid(xz + hz)
    return ((1 - z) * jnp.tanh(xn + jax.nn.sigmoid(xr + hr) * hn) + z * state[0],)


def _vanilla(x: jax.Array, h: jax.Array, state: State) -> State:
    return (jnp.tanh(x + h),)


class Cell(NamedTuple):
    """gates: pre-activations a feature; states: arrays of a state; step(x_BG, h_BG, state) -> state.

    x_BG are the input's and h_BG the state's shares of the pre-activations, biases included.
    """

    gates: int
    states: int
    step: Callable[[jax.Array, jax.Array, State], State]


CELLS = {
    "lstm": Cell(4, 2, _lstm),  # Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000
    "gru": Cell(3, 1, _gru),  # Cho et al. 2014, the reset gate applied after the product, as in cuDNN
    "vanilla": Cell(1, 1, _vanilla),  # Elman 1990
}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def run(cell: str, x_TBG: jax.Array, kernel_HG: jax.Array, bias_G: jax.Array, drop_BH, start_TB, real_TB, state: State):
    """A cell over time: returns (state after each step stacked over T, the last state).

    Args:
        cell: a key of CELLS.
        x_TBG: the input's share of the pre-activations.
        kernel_HG, bias_G: the recurrent map.
        drop_BH: multiplies the state that the map reads, the same at every step (variational dropout).
        start_TB: bool, where a document begins: the state before it is zero.
        real_TB: bool, False at padding, which leaves the state as it is.
        state: before the first step.
    """
    return _forward(cell, x_TBG, kernel_HG, bias_G, drop_BH, start_TB, real_TB, state)[0]


def _step(cell, x, h, real, state):
    new = CELLS[cell].step(x, h, state)
    return tuple(jnp.where(real[:, None], n, s) for n, s in zip(new, state))


def _forward(cell, x_TBG, kernel_HG, bias_G, drop_BH, start_TB, real_TB, state):
    def body(state, inputs):
        x, start, real = inputs
        before = tuple(jnp.where(start[:, None], 0, s) for s in state)
        h = (before[0] * drop_BH) @ kernel_HG + bias_G
        after = _step(cell, x, h, real, before)
        return after, (after, before)

    last, (after, before) = jax.lax.scan(body, state, (x_TBG, start_TB, real_TB))
    return (after, last), (x_TBG, kernel_HG, bias_G, drop_BH, start_TB, real_TB, before)


def _backward(cell, kept, gradients):
    """By hand because of the map: its gradient is then one product over all steps, not a sum of T of them.

    The dropout mask is drawn, not learned: its gradient is zero. None are those of bools.
    """
    x_TBG, kernel_HG, bias_G, drop_BH, start_TB, real_TB, before = kept
    after_bar, last_bar = gradients

    def body(state_bar, inputs):
        x, start, real, state, out_bar = inputs
        h = (state[0] * drop_BH) @ kernel_HG + bias_G
        _, pull = jax.vjp(lambda x, h, s: _step(cell, x, h, real, s), x, h, state)
        x_bar, h_bar, before_bar = pull(tuple(a + b for a, b in zip(state_bar, out_bar)))
        through = (h_bar @ kernel_HG.T) * drop_BH
        before_bar = (before_bar[0] + through, *before_bar[1:])
        return tuple(jnp.where(start[:, None], 0, s) for s in before_bar), (x_bar, h_bar)

    inputs = (x_TBG, start_TB, real_TB, before, after_bar)
    state_bar, (x_bar, h_bar) = jax.lax.scan(body, last_bar, inputs, reverse=True)
    kernel_bar = jnp.einsum("TBH,TBG->HG", before[0] * drop_BH, h_bar)
    return x_bar, kernel_bar, h_bar.sum((0, 1)), jnp.zeros_like(drop_BH), None, None, state_bar


run.defvjp(_forward, _backward)


class Recurrent(nn.Module):
    """One recurrent layer over x_BTD, forwards, or in both directions side by side.

    Attributes:
        cell: a key of CELLS.
        width: features of the output; both directions share them.
        reverse_too: adds the other direction.
        dropout: of the inputs, one mask a row for all times (Gal and Ghahramani 2016).
        recurrent_dropout: of the state that the recurrent map reads, likewise.
    """

    cell: str
    width: int
    reverse_too: bool
    dropout: float
    recurrent_dropout: float
    train: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BTD: jax.Array, start_BT: jax.Array, real_BT: jax.Array, state: State):
        """Returns (y_BTD, state): zeros at padding; `state` is read and advanced by the forward direction alone."""
        x_BTD = nn.Dropout(self.dropout, broadcast_dims=(1,), deterministic=not self.train)(x_BTD)
        if not self.reverse_too:
            y_BTD, state = self._direction("forward", self.width, x_BTD, start_BT, real_BT, state)
        else:
            half = self.width // 2
            zeros = tuple(jnp.zeros((x_BTD.shape[0], half), jnp.float32) for _ in state)
            ahead, _ = self._direction("forward", half, x_BTD, start_BT, real_BT, zeros)
            # Read backwards a row begins with its padding, which leaves the zero state as it is; a document begins
            # where it ends.
            ends_BT = jnp.concatenate([start_BT[:, 1:], jnp.ones_like(start_BT[:, :1])], axis=1)
            x, ends, real = (jnp.flip(a, 1) for a in (x_BTD, ends_BT, real_BT))
            back, _ = self._direction("backward", half, x, ends, real, zeros)
            y_BTD = jnp.concatenate([ahead, jnp.flip(back, 1)], axis=-1)
        return constrain(jnp.where(real_BT[..., None], y_BTD, 0), "batch", "length", "activation"), state

    def _direction(self, name: str, width: int, x_BTD, start_BT, real_BT, state: State):
        cell, inputs = CELLS[self.cell], x_BTD.shape[-1]
        gates = cell.gates * width
        init = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
        input_DG = parameter(self, f"{name}_input_kernel", init, ("embed", "gates"), (inputs, gates))
        recurrent = nn.initializers.orthogonal()

        def blocks(key, shape, dtype=jnp.float32):  # orthogonal gate by gate
            keys = jax.random.split(key, cell.gates)
            return jnp.concatenate([recurrent(k, (width, width), dtype) for k in keys], axis=1)

        kernel_HG = parameter(self, f"{name}_recurrent_kernel", blocks, ("embed", "gates"), (width, gates))

        def forget(key, shape, dtype=jnp.float32):  # an LSTM remembers at first (Jozefowicz et al. 2015)
            bias = jnp.zeros(shape, dtype)
            return bias.at[width : 2 * width].set(1.0) if self.cell == "lstm" else bias

        input_bias_G = parameter(self, f"{name}_input_bias", forget, ("gates",), (gates,))
        bias_G = parameter(self, f"{name}_recurrent_bias", nn.initializers.zeros, ("gates",), (gates,))
        x_BTG = x_BTD.astype(self.dtype) @ input_DG.astype(self.dtype) + input_bias_G.astype(self.dtype)
        # The state, its sums and the gates are float32 whatever the compute dtype: errors of a state add up over time.
        drop_BH = jnp.ones((x_BTD.shape[0], width))
        drop_BH = nn.Dropout(self.recurrent_dropout, deterministic=not self.train)(drop_BH)
        over_time = jnp.swapaxes(x_BTG, 0, 1).astype(jnp.float32)
        # The map's rows lie as the state that they meet: what fsdp splits comes together once, before the loop. Left
        # split it is also multiplied wrongly: XLA's partitioner (jax 0.10.2 and 0.11.2) fails at
        # x[(data, fsdp), tensor] @ w[tensor, fsdp] where the result is to lie like x, as the state's gradient does from
        # step to step; one such product on 2 x 2 x 2 devices shows it.
        kernel_HG = constrain(kernel_HG, "activation", "gates")
        ran: Any = run(
            self.cell, over_time, kernel_HG, bias_G, drop_BH, jnp.swapaxes(start_BT, 0, 1),
            jnp.swapaxes(real_BT, 0, 1), state,
        )  # fmt: skip
        after, state = ran
        return jnp.swapaxes(after[0], 0, 1).astype(self.dtype), state
