"""The product of projections against JAX's own gradient and against numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm.nn.matmul import matmul


@pytest.mark.parametrize("inputs,outputs", [(3, 8), (8, 3)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_value_and_gradients(inputs, outputs, dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 5, inputs)), dtype)
    kernel = jnp.asarray(rng.normal(size=(inputs, outputs)), dtype)
    y_bar = jnp.asarray(rng.normal(size=(2, 5, outputs)), dtype)
    y, pull = jax.vjp(matmul, x, kernel)
    x_bar, kernel_bar = pull(y_bar)
    assert (y.dtype, x_bar.dtype, kernel_bar.dtype) == (dtype, dtype, dtype)
    x64, kernel64, bar64 = (np.asarray(a, np.float64) for a in (x, kernel, y_bar))
    bound = 1e-5 if dtype == "float32" else 4e-2
    np.testing.assert_allclose(np.asarray(y, np.float64), x64 @ kernel64, rtol=bound, atol=bound)
    np.testing.assert_allclose(np.asarray(x_bar, np.float64), bar64 @ kernel64.T, rtol=bound, atol=bound)
    expected = np.einsum("bti,bto->io", x64, bar64)
    np.testing.assert_allclose(np.asarray(kernel_bar, np.float64), expected, rtol=bound, atol=bound)


@pytest.mark.parametrize("inputs,outputs", [(3, 8), (8, 3)])
def test_the_narrower_operand_is_the_one_that_is_transposed(inputs, outputs):
    """What the function is for: the first operand of the product over rows is the narrower of the two."""
    x, kernel = jnp.ones((2, 5, inputs)), jnp.ones((inputs, outputs))
    program = jax.make_jaxpr(jax.grad(lambda kernel: matmul(x, kernel).sum()))(kernel)
    over_rows = [e for e in program.jaxpr.eqns if e.primitive.name == "dot_general"][-1]
    assert over_rows.invars[0].aval.shape[-1] == 3, program
