"""The worked example of three tokens: what a widely copied text prints for it, and what is right.

Similarities of three queries with three keys, no scaling, values 2, 3, 4. The text prints weights that do not sum to
one, and calls the nine products of weight and value the output; the output of attention is their sum in each row,
under weights that are the row softmax of the similarities.
"""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm.attention import IMPLEMENTATIONS, attention, attention_weights
from llm.attention.api import why_not_here
from tests.conformance import attention as table

SIMILARITIES = np.array([[0.8, 0.5, 0.3], [0.6, 0.9, 0.7], [0.4, 0.6, 0.8]])
VALUES = np.array([2.0, 3.0, 4.0])
PRINTED_WEIGHTS = np.array([[0.6, 0.4, 0.2], [0.3, 0.7, 0.4], [0.2, 0.5, 0.3]])
PRINTED_PRODUCTS = np.array([[1.2, 1.2, 0.8], [0.6, 2.1, 1.6], [0.4, 1.5, 1.2]])
WEIGHTS = np.array([[0.426013, 0.315598, 0.258390], [0.289433, 0.390694, 0.319873], [0.269307, 0.328933, 0.401760]])
OUTPUTS = np.array([2.832377, 3.030440, 3.132452])

TOLERANCE = {"float32": 2e-6, "bfloat16": 3e-2, "float16": 4e-3}


def inputs(dtype="float32", width=3):
    """q, k and v of shape (1, 3, 1, width) whose dot products q k^T are the similarities; widths pad with zeros."""
    q, k, v = np.zeros((3, 1, 3, 1, width))
    q[0, :, 0, :3] = SIMILARITIES
    k[0, :, 0, :3] = np.eye(3)
    v[0, :, 0, 0] = VALUES
    return [jnp.asarray(x, dtype) for x in (q, k, v)]


def test_inputs_have_the_similarities_as_dot_products():
    q, k, _ = inputs()
    np.testing.assert_allclose(jnp.einsum("BTNH,BSNH->TS", q, k), SIMILARITIES, atol=1e-7)


def test_the_printed_products_come_from_the_printed_weights():
    np.testing.assert_allclose(PRINTED_WEIGHTS * VALUES, PRINTED_PRODUCTS, atol=1e-12)


def test_first_error_the_printed_weights_are_no_distribution():
    np.testing.assert_allclose(PRINTED_WEIGHTS.sum(-1), [1.2, 1.4, 1.0], atol=1e-12)
    np.testing.assert_allclose(WEIGHTS.sum(-1), 1.0, atol=2e-6)
    # Not even where a row does sum to one are they the softmax.
    assert np.abs(PRINTED_WEIGHTS - WEIGHTS).max(-1).min() > 0.09


def test_second_error_nine_products_are_not_three_outputs():
    right = (WEIGHTS * VALUES).sum(-1)
    assert PRINTED_PRODUCTS.shape == (3, 3) and right.shape == (3,)
    np.testing.assert_allclose(right, OUTPUTS, atol=5e-6)
    assert np.abs(PRINTED_PRODUCTS.sum(-1) - OUTPUTS).min() > 0.03


def test_weights():
    q, k, _ = inputs()
    np.testing.assert_allclose(attention_weights(q, k, scale=1.0)[0, 0], WEIGHTS, atol=2e-6)


# What is not complete; the others may refuse nothing. Without its device, a kernel of ours runs in its interpreter.
PARTIAL = {
    "cudnn": "a GPU, half precision and a width of a multiple of 8",
    "mosaic_gpu": "half precision",
    "mosaic_tpu": "float32 or bfloat16",
}
INTERPRETED = {"mosaic_gpu": table.gpu_interpreted, "mosaic_tpu": table.tpu_interpreted}


@contextlib.contextmanager
def skipped_where_lacking(implementation):
    there = implementation not in INTERPRETED or why_not_here(implementation) is None
    try:
        with contextlib.nullcontext() if there else INTERPRETED[implementation]():
            yield
    except NotImplementedError as error:
        if implementation not in PARTIAL:
            raise
        pytest.skip(str(error))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width", [3, 8, 64])
@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "auto"])
def test_outputs(implementation, width, dtype):
    q, k, v = inputs(dtype, width)
    with skipped_where_lacking(implementation):
        out = attention(q, k, v, scale=1.0, implementation=implementation)
    assert out.dtype == dtype
    np.testing.assert_allclose(np.float32(out[0, :, 0, 0]), OUTPUTS, atol=TOLERANCE[dtype])
    np.testing.assert_array_equal(out[0, :, 0, 1:], 0)


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "auto"])
@pytest.mark.parametrize("argument", [0, 1, 2])
def test_gradient_against_finite_differences(implementation, argument):
    """d(sum of squares of the outputs), against central differences of a float64 numpy softmax."""

    def in_numpy(q, k, v):
        s = np.einsum("th,sh->ts", q[0, :, 0], k[0, :, 0])
        e = np.exp(s - s.max(-1, keepdims=True))
        return ((e / e.sum(-1, keepdims=True) @ v[0, :, 0]) ** 2).sum()

    def loss(q, k, v):
        return jnp.sum(attention(q, k, v, scale=1.0, implementation=implementation) ** 2)

    arrays = inputs()
    with skipped_where_lacking(implementation):
        gradient = jax.jit(jax.grad(loss, argument))(*arrays)
    exact = [np.asarray(x, np.float64) for x in arrays]
    for index in np.ndindex(exact[argument].shape):
        step = np.zeros_like(exact[argument])
        step[index] = 1e-5
        moved = [[x + sign * step if i == argument else x for i, x in enumerate(exact)] for sign in (1, -1)]
        difference = (in_numpy(*moved[0]) - in_numpy(*moved[1])) / 2e-5
        np.testing.assert_allclose(gradient[index], difference, atol=2e-5)
