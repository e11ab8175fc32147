"""The GPT family: causality, packing, dropout, cache, layouts, and refusals."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm import models
from llm.errors import InputError
from llm.models.gpt import GPTSpec

TINY = GPTSpec(vocab_size=31, context=24, layers=2, width=16, heads=4, kv_heads=2, ff_width=24)
LLAMA = dataclasses.replace(TINY, activation="silu", gated=True, tied=False, qk_norm=True, window=5)
GPT2 = dataclasses.replace(TINY, kv_heads=None, norm="layer", bias=True, position="learned", norm_epsilon=1e-5)
SPECS = {"tiny": TINY, "llama": LLAMA, "gpt2": GPT2}


def make(spec, seed=0):
    model = models.build(spec)
    everything = lambda m: m.unembed(m({"tokens": jnp.zeros((1, 1), jnp.int32)}).hidden_BTD)  # noqa: E731
    return model, nn.unbox(model.init(jax.random.key(seed), method=everything))["params"]


def tokens(*shape, seed=0, vocab=31):
    return jnp.asarray(np.random.default_rng(seed).integers(0, vocab, shape), jnp.int32)


def logits(model, params, batch, **how):
    @jax.jit
    def run(params, batch):
        hidden = model.apply({"params": params}, batch, **how).hidden_BTD
        return model.apply({"params": params}, hidden, method="unembed")

    return run(params, batch)


@pytest.mark.parametrize("name", SPECS)
def test_no_logit_sees_a_later_token(name):
    model, params = make(SPECS[name])
    a = tokens(2, 12)
    b = a.at[:, 7].set((a[:, 7] + 1) % 31)
    one, other = logits(model, params, {"tokens": a}), logits(model, params, {"tokens": b})
    np.testing.assert_array_equal(one[:, :7], other[:, :7])
    assert np.abs(one[:, 7:] - other[:, 7:]).max(-1).min() > 1e-5


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
def test_packed_documents_are_separate(name, implementation):
    spec = dataclasses.replace(SPECS[name], attention=implementation)
    model, params = make(spec)
    first, second = tokens(1, 5, seed=1), tokens(1, 6, seed=2)
    pad = jnp.zeros((1, 3), jnp.int32)
    batch = {
        "tokens": jnp.concatenate([first, second, pad], 1),
        "segments": jnp.array([[1] * 5 + [2] * 6 + [0] * 3]),
        "positions": jnp.array([[*range(5), *range(6), *range(3)]]),
    }
    packed = logits(model, params, batch)
    np.testing.assert_allclose(packed[:, :5], logits(model, params, {"tokens": first}), atol=1e-5)
    np.testing.assert_allclose(packed[:, 5:11], logits(model, params, {"tokens": second}), atol=1e-5)

    changed = dict(batch, tokens=batch["tokens"].at[0, 1].set((batch["tokens"][0, 1] + 1) % 31))
    again = logits(model, params, changed)
    np.testing.assert_array_equal(packed[:, 5:11], again[:, 5:11])
    assert np.abs(packed[:, 1:5] - again[:, 1:5]).max() > 1e-4

    def second_loss(table):
        p = {**params, "embed": {"table": table}}
        return model.apply({"params": p}, batch).hidden_BTD[:, 5:11].sum()

    gradient = jax.jit(jax.grad(second_loss))(params["embed"]["table"])
    only_first = sorted(set(np.asarray(first[0]).tolist()) - set(np.asarray(second[0]).tolist()) - {0})
    assert only_first
    np.testing.assert_array_equal(gradient[jnp.array(only_first)], 0)


@pytest.mark.parametrize("name", SPECS)
def test_cached_decoding_equals_the_whole_for_every_prefill(name):
    model, params = make(SPECS[name])
    row = tokens(2, 12)
    whole = logits(model, params, {"tokens": row})
    feed = jax.jit(lambda p, t, c: model.apply({"params": p}, {"tokens": t}, cache=c))
    for prefill in (1, 5, 11):
        out, cache = [], model.init_cache(2, 12)
        pieces = [row[:, :prefill]] + [row[:, i : i + 1] for i in range(prefill, 12)]
        for piece in pieces:
            output = feed(params, piece, cache)
            out.append(output.hidden_BTD)
            cache = output.cache
        got = model.apply({"params": params}, jnp.concatenate(out, 1), method="unembed")
        np.testing.assert_allclose(got, whole, atol=2e-5)
        np.testing.assert_array_equal(cache.lengths_B, 12)


def test_dropout_masks_differ_by_layer_key_and_row_and_repeat_by_key():
    spec = dataclasses.replace(TINY, dropout=0.5, layers=3)
    model, params = make(spec)
    batch = {"tokens": jnp.broadcast_to(tokens(1, 12), (2, 12))}

    def run(key):
        rngs = {"dropout": jax.random.key(key)}
        return model.apply({"params": params}, batch, train=True, rngs=rngs).hidden_BTD

    np.testing.assert_array_equal(run(1), run(1))
    assert np.abs(run(1) - run(2)).max() > 1e-3
    assert np.abs(run(1)[0] - run(1)[1]).max() > 1e-3
    off = model.apply({"params": params}, batch).hidden_BTD
    np.testing.assert_array_equal(off[0], off[1])

    # The zeros that each block's residual dropout made, layer by layer.
    _, seen = model.apply(
        {"params": params}, batch, train=True, rngs={"dropout": jax.random.key(1)},
        capture_intermediates=lambda m, _: isinstance(m, nn.Dropout), mutable=["intermediates"],
    )  # fmt: skip
    layers = next(x for x in jax.tree.leaves(seen["intermediates"]["stack"]) if x.ndim == 4)
    dropped = np.asarray(layers == 0)
    assert dropped.shape[0] == 3
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert 0.35 < (dropped[i] == dropped[j]).mean() < 0.65


@pytest.mark.parametrize("change", [{"unroll": 2}, {"remat": True}])
def test_layouts_of_the_same_program_agree(change):
    model, params = make(TINY)
    other = models.build(dataclasses.replace(TINY, **change))
    batch = {"tokens": tokens(2, 12)}

    def loss(m):
        return jax.jit(jax.grad(lambda p: jnp.sum(m.apply({"params": p}, batch).hidden_BTD ** 2)))(params)

    for a, b in zip(jax.tree.leaves(loss(model)), jax.tree.leaves(loss(other))):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-5)


def test_bfloat16_computes_in_bfloat16_over_float32_parameters():
    model, params = make(dataclasses.replace(TINY, dtype="bfloat16"))
    assert {x.dtype.name for x in jax.tree.leaves(params)} == {"float32"}
    output = model.apply({"params": params}, {"tokens": tokens(1, 8)})
    assert output.hidden_BTD.dtype == jnp.bfloat16
    out = logits(model, params, {"tokens": tokens(1, 8)})
    exact = logits(make(TINY)[0], params, {"tokens": tokens(1, 8)})
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, exact, atol=0.05)


def test_every_layer_has_the_leading_axis():
    _, params = make(TINY)
    assert all(x.shape[0] == TINY.layers for x in jax.tree.leaves(params["stack"]))


def test_parameter_count_by_hand():
    _, params = make(GPT2)
    D, F, L, V = 16, 24, 2, 31
    layer = 4 * (D * D + D) + (D * F + F) + (F * D + D) + 4 * D
    assert sum(x.size for x in jax.tree.leaves(params)) == V * D + 24 * D + L * layer + 2 * D


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"heads": 3}, "does not divide model.width"),
        ({"kv_heads": 3}, "model.kv_heads=3 does not divide model.heads=4"),
        ({"layers": 0}, "model.layers=0"),
        ({"dropout": 1.0}, "model.dropout=1.0"),
        ({"activation": "swish"}, "there are gelu"),
        ({"head_width": 3}, "rotary positions need pairs"),
        ({"unroll": 3}, "does not divide model.layers"),
    ],
)
def test_wrong_settings_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(TINY, **changes)
