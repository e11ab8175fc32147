"""Rematerialisation: every policy gives the same numbers, and computes again what its name says."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm import models
from llm.errors import InputError
from llm.models import GPTSpec, RNNSpec, T5Spec, flops
from llm.nn.remat import NAMES
from tests.quick import quick

SMALL = dict(vocab_size=19, layers=2, width=16, heads=2, ff_width=24, dropout=0.0, attention="reference")
SPECS = {
    "gpt": GPTSpec(**SMALL, context=8),
    "t5": T5Spec(**SMALL, head_width=8),
    "rnn": RNNSpec(vocab_size=19, layers=2, width=16),
}
ROW = {"tokens": jnp.arange(8)[None] % 19, "segments": jnp.ones((1, 8), jnp.int32)}
BATCH = ROW | {f"source_{name}": x for name, x in ROW.items()}


def gradient_of(spec, remat):
    """(f(params) -> loss and gradient, shapes of the parameters)."""
    model = models.build(dataclasses.replace(spec, remat=remat))

    def loss(params):
        return jnp.square(model.apply({"params": params}, BATCH, train=True).hidden_BTD).sum()

    params = nn.unbox(jax.eval_shape(lambda: model.init(jax.random.key(0), BATCH)["params"]))
    return jax.value_and_grad(loss), params


@pytest.mark.parametrize("family", SPECS)
def test_policies_repeat_the_products_that_they_do_not_keep(family):
    count = {}
    for remat in NAMES:
        function, params = gradient_of(SPECS[family], remat)
        count[remat] = str(jax.make_jaxpr(function)(params)).count("dot_general[")
    assert count["all"] > count["dots_no_batch"] and count["dots"] == count[""], count
    # A recurrent layer has no batches of matrices, as attention's scores are.
    assert (count["dots_no_batch"] > count["dots"]) == (family != "rnn"), count


def test_policies_change_no_number():
    found = []
    for remat in NAMES:
        function, shapes = gradient_of(SPECS["gpt"], remat)
        rng = np.random.default_rng(0)
        params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), shapes)  # noqa: B023
        found.append(quick(function)(params))
    for one in found[1:]:
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-4), one, found[0])


def test_what_is_repeated_is_counted():
    length, a_token = 8, 4 * 2 * 16 * 8  # of attention
    for remat, spec in ((remat, dataclasses.replace(SPECS["gpt"], remat=remat)) for remat in NAMES):
        model, (_, params) = models.build(spec), gradient_of(spec, remat)
        want = {"": 0, "all": model.flops_per_token(params, length)}.get(remat, a_token)
        assert flops.repeated(model, params, length) == want


def test_an_unknown_policy_is_refused():
    with pytest.raises(InputError, match="model.remat='some': there are '', all, dots, dots_no_batch"):
        GPTSpec(remat="some")
