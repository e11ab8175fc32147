"""Recurrent layers in both directions, on rows with padding."""

import jax
import numpy as np
import pytest

from llm.nn import recurrent
from llm.nn.pool import pool
from tests.quick import quick


def test_both_directions_of_padded_rows_by_hand(monkeypatch):
    """The cell h + x, whose states are sums (CASES: C40), on rows of 2, 4, 0 and 1 places with any padding."""
    monkeypatch.setitem(recurrent.CELLS, "linear", recurrent.Cell(1, 1, lambda x, h, state: (x + h,)))
    layer = recurrent.Recurrent("linear", 2, True, 0.0, 0.0, False)
    real = np.arange(4) < np.array([[2], [4], [0], [1]])
    one, zero = np.ones((1, 1), np.float32), np.zeros(1, np.float32)
    params = {
        f"{way}_{part}": x
        for way in ("forward", "backward")
        for part, x in {
            "input_kernel": one,
            "recurrent_kernel": one,
            "input_bias": zero,
            "recurrent_bias": zero,
        }.items()
    }
    run = jax.jit(lambda x: layer.apply({"params": params}, x, real & False, real, (np.zeros((4, 2), np.float32),))[0])
    for padding in (99.0, -5.0, 1e30):
        x = np.where(real, [[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4], [7, 2, 3, 4]], padding)
        y = run(x[..., None].astype(np.float32))
        np.testing.assert_array_equal(y[..., 0], [[1, 3, 0, 0], [1, 3, 6, 10], [0] * 4, [7, 0, 0, 0]])
        np.testing.assert_array_equal(y[..., 1], [[3, 2, 0, 0], [10, 9, 7, 4], [0] * 4, [7, 0, 0, 0]])
        np.testing.assert_array_equal(pool(y, real, "last")[:, 0], [3, 10, 0, 7])
        np.testing.assert_array_equal(pool(y, real, "first")[:, 1], [3, 10, 0, 7])
        np.testing.assert_array_equal(pool(y, real, "mean"), [[2, 2.5], [5, 7.5], [0, 0], [7, 7]])
        np.testing.assert_array_equal(pool(y, real, "max"), [[3, 3], [10, 10], [0, 0], [7, 7]])


@pytest.mark.parametrize("cell", recurrent.CELLS)
def test_both_directions_of_a_padded_row_are_those_of_the_row_alone(cell):
    """And the way back is the way ahead, by its own parameters, of the row turned round."""
    rng = np.random.default_rng(3)
    gates, states = recurrent.CELLS[cell].gates, recurrent.CELLS[cell].states
    sizes = {"input_kernel": (3, 2 * gates), "recurrent_kernel": (2, 2 * gates), "input_bias": 2 * gates,
             "recurrent_bias": 2 * gates}  # fmt: skip
    params = {
        f"{way}_{part}": rng.normal(size=size).astype(np.float32)
        for way in ("forward", "backward")
        for part, size in sizes.items()
    }
    x_BTD = rng.normal(size=(2, 5, 3)).astype(np.float32)
    real_BT = np.arange(5) < np.array([[3], [5]])

    def read(both, params, x, real):
        layer = recurrent.Recurrent(cell, 4 if both else 2, both, 0.0, 0.0, False)
        empty = tuple(np.zeros((len(x), 4 if both else 2), np.float32) for _ in range(states))
        return quick(lambda x: layer.apply({"params": params}, x, real & False, real, empty)[0])(x)

    ahead = {name: x for name, x in params.items() if name.startswith("forward")}
    back = {name.replace("backward", "forward"): x for name, x in params.items() if name.startswith("backward")}
    y_BTD = read(True, params, x_BTD, real_BT)
    for row, length in enumerate((3, 5)):
        alone, there = x_BTD[row : row + 1, :length], np.ones((1, length), bool)
        np.testing.assert_allclose(y_BTD[row, :length, :2], read(False, ahead, alone, there)[0], atol=1e-6)
        turned = read(False, back, alone[:, ::-1], there)[0, ::-1]
        np.testing.assert_allclose(y_BTD[row, :length, 2:], turned, atol=1e-6)
    assert (np.asarray(y_BTD[0, 3:]) == 0).all()
