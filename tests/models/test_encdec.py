"""What is the encoder-decoder's own: whose table is whose, the bias of the logits, the order of the sinusoids."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from llm import models
from llm.models import EncDecSpec
from llm.nn.position import sinusoids
from llm.training.roles import path_name, role
from tests.quick import quick

TOKENS = jnp.asarray([[1, 2, 3, 4]])
BATCH = {"tokens": TOKENS, "source_tokens": jnp.asarray([[5, 6, 7]])}
TINY = EncDecSpec(vocab_size=9, layers=1, width=8, heads=2, ff_width=8, position="learned", context=6, dropout=0.0)


@functools.cache
def programs(spec):
    """Fresh parameters, and logits by parameters, jitted."""
    model = models.build(spec)

    def whole(module):
        return module.unembed(module(BATCH).hidden_BTD)

    fresh = quick(lambda: nn.unbox(model.init(jax.random.key(0), method=whole)["params"]))
    return fresh, quick(lambda params: model.apply({"params": params}, method=whole))


def logits(spec, params=None):
    """(logits, parameters), fresh ones where none are given."""
    fresh, apply = programs(spec)
    params = fresh() if params is None else params
    return apply(params), params


def test_an_encoder_with_tables_of_its_own_reads_by_them():
    shared, params = logits(TINY)
    apart = dataclasses.replace(TINY, shared=False)
    both = params | {"embed_source": params["embed"], "embed_source_position": params["embed_position"]}
    np.testing.assert_array_equal(logits(apart, both)[0], shared)
    for name, touched in (("embed_source", 5), ("embed_source_position", 2)):
        table = both[name]["table"].at[touched].add(1.0)
        assert np.abs(logits(apart, both | {name: {"table": table}})[0] - shared).max() > 1e-3
    # The decoder's own table says nothing of a token that only the source has, but as what it might write.
    table = both["embed"]["table"].at[5].add(jnp.arange(8.0))
    changed = np.abs(logits(apart, both | {"embed": {"table": table}})[0] - shared).max((0, 1))
    assert changed[5] > 1e-3 and np.delete(changed, 5).max() == 0


def test_an_unembedding_and_a_bias_of_its_own():
    plain, params = logits(dataclasses.replace(TINY, tied=False))
    bias = jnp.arange(9.0)
    biased, _ = logits(dataclasses.replace(TINY, tied=False, logit_bias=True), params | {"logit_bias": bias})
    np.testing.assert_allclose(biased - plain, np.broadcast_to(bias, plain.shape), atol=1e-5)
    _, all_of_it = logits(dataclasses.replace(TINY, shared=False, tied=False, logit_bias=True))
    found = {path_name(path): role(path_name(path)).name for path, _ in jax.tree_util.tree_leaves_with_path(all_of_it)}
    assert found["logit_bias"] == "bias" and found["embed_source/table"] == "embedding"


def test_sinusoids_in_halves_are_the_others_put_in_order():
    places = jnp.arange(5)[None]
    turns, halves = sinusoids(places, 8), sinusoids(places, 8, halves=True)
    np.testing.assert_array_equal(halves, turns[..., [0, 2, 4, 6, 1, 3, 5, 7]])
