"""Positions, norms and activations against published and hand-computed values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm.nn.mlp import ACTIVATIONS
from llm.nn.norm import Norm
from llm.nn.position import rotary


def test_rotary_pairs_halves():
    x = jnp.array([1.0, 0, 0, 0]).reshape(1, 1, 1, 4)
    got = rotary(x, jnp.array([[1]]))[0, 0, 0]
    np.testing.assert_allclose(got, [0.5403023, 0, 0.8414710, 0], atol=1e-6)
    second = rotary(jnp.array([0.0, 0, 0, 1]).reshape(1, 1, 1, 4), jnp.array([[1]]))[0, 0, 0]
    np.testing.assert_allclose(second, [0, -np.sin(0.01), 0, np.cos(0.01)], atol=1e-6)


def test_rotary_keeps_lengths_and_depends_on_distance_alone():
    q, k = (jnp.asarray(np.random.default_rng(s).normal(size=(1, 1, 1, 8)), jnp.float32) for s in (0, 1))

    def score(i, j):
        return jnp.vdot(rotary(q, jnp.array([[i]])), rotary(k, jnp.array([[j]])))

    np.testing.assert_allclose(score(3, 7), score(103, 107), atol=1e-4)
    assert abs(score(3, 7) - score(3, 8)) > 1e-3
    np.testing.assert_allclose(jnp.linalg.norm(rotary(q, jnp.array([[50]]))), jnp.linalg.norm(q), rtol=1e-6)


def test_rotary_tells_far_positions_apart_in_bfloat16():
    x = jnp.ones((1, 2, 1, 8), jnp.bfloat16)
    got = rotary(x, jnp.array([[1000, 1001]]))
    assert got.dtype == jnp.bfloat16 and float(jnp.abs(got[0, 0] - got[0, 1]).max()) > 0.1


@pytest.mark.parametrize("epsilon, value", [(1e-12, 0.99995), (1e-6, 0.0995), (1e-5, 0.0316)])
def test_layer_norm_epsilon(epsilon, value):
    x = 1e-4 * jnp.array([[-1.0, 1, -1, 1]])
    norm = Norm("layer", epsilon)
    got = norm.apply(norm.init(jax.random.key(0), x), x)
    np.testing.assert_allclose(jnp.abs(got), value, rtol=2e-3)


def test_rms_norm_has_no_mean_and_float32_statistics():
    x = jnp.array([[3.0, 3.0, 3.0, 3.0]])
    norm = Norm("rms")
    params = norm.init(jax.random.key(0), x)
    np.testing.assert_allclose(norm.apply(params, x), 1.0, rtol=1e-5)
    half = jnp.full((1, 4096), 300.0, jnp.float16)  # its squares overflow float16
    norm = Norm("rms", dtype=jnp.float16)
    np.testing.assert_allclose(norm.apply(norm.init(jax.random.key(0), half), half), 1.0, rtol=1e-3)


def test_activations():
    at_one = {"gelu": 0.841345, "gelu_tanh": 0.841192, "relu": 1.0, "relu2": 1.0, "silu": 0.731059}
    assert set(at_one) == set(ACTIVATIONS)
    for name, value in at_one.items():
        np.testing.assert_allclose(ACTIVATIONS[name](jnp.float32(1.0)), value, atol=2e-6, err_msg=name)
    assert ACTIVATIONS["relu2"](jnp.float32(3.0)) == 9.0
