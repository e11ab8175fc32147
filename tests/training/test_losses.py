"""The losses of the objectives: smoothing, masked tokens, pairs, answers, and texts that belong together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm.data.spec import ObjectiveSpec
from llm.training import losses
from llm.training.losses import OBJECTIVES, Settings
from llm.training.spec import TrainingSpec

P = np.array([0.6, 0.1, 0.1, 0.1, 0.1])


def test_smoothing_spreads_mass_over_the_whole_vocabulary():
    """CASES C17: 0.65417 with the mass over V; without smoothing the plain cross-entropy."""
    logits = jnp.log(jnp.asarray([P, P], jnp.float32))
    smoothed = losses.cross_entropy(logits, jnp.array([0, 0]), 0.1)
    by_hand = -(0.92 * np.log(0.6) + 4 * 0.02 * np.log(0.1))
    np.testing.assert_allclose(smoothed, by_hand, rtol=1e-6)
    np.testing.assert_allclose(by_hand, 0.65417, atol=1e-5)
    np.testing.assert_allclose(losses.cross_entropy(logits, jnp.array([0, 1])), -np.log([0.6, 0.1]), rtol=1e-6)


class Linear:
    """A model by hand: hidden states are rows of a table, logits their products with another."""

    carries = False
    unembedding = ("out",)

    def __init__(self, aux=None):
        self.aux = aux or {}

    def apply(self, variables, *args, method=None, cache=None, train=False, rngs=None):
        p = variables["params"]
        if method is None:
            hidden = p["table"][args[0]["tokens"]]
            return type("Out", (), {"hidden_BTD": hidden, "aux": self.aux, "cache": None})
        if method == "unembed":
            return args[0] @ p["out"]
        if method == "next_sentence":
            return args[0][:, 0] @ p["pair"]
        if method == "classify":
            return args[0].mean(1) @ p["pair"]
        if method == "spans":
            return args[0] @ p["pair"][:, 0], args[0] @ p["pair"][:, 1]
        assert method == "sentence"
        mean = args[0].mean(1)
        return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)


def parameters(seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.normal(size=shape), jnp.float32)
        for name, shape in (("table", (11, 4)), ("out", (4, 11)), ("pair", (4, 2)))
    }


def batch(rows=3, length=8, seed=1):
    rng = np.random.default_rng(seed)
    ids = lambda: jnp.asarray(rng.integers(0, 11, (rows, length)), jnp.int32)  # noqa: E731
    weights = jnp.asarray(rng.random((rows, length)) < 0.3, jnp.float32)
    return {"tokens": ids(), "targets": ids(), "weights": weights, "segments": jnp.ones((rows, length), jnp.int32)}


def mean_of(kind, b, params, settings=Settings(), aux=None):
    def run(p):
        found = losses.sums(Linear(aux), kind, settings)(p, b)
        return found["loss"][0] / jnp.maximum(found["loss"][1], 1.0), found

    return jax.jit(jax.value_and_grad(run, has_aux=True))(params)


@pytest.mark.parametrize("chunk", [None, 1, 4, 7, 64])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_leaving_out_places_that_are_not_masked_changes_nothing(chunk, smoothing):
    b, params = batch(), parameters()
    (value, found), gradient = mean_of("masked", b, params, Settings(chunk, smoothing))
    (other, _), by_all = mean_of("causal", b, params, Settings(None, smoothing))
    assert found["loss"][1] == b["weights"].sum() > 0
    np.testing.assert_allclose(value, other, rtol=1e-5)
    for name in ("table", "out"):
        np.testing.assert_allclose(gradient[name], by_all[name], atol=1e-6)


def test_a_batch_without_a_masked_token_has_no_loss_and_no_gradient():
    b = batch() | {"weights": jnp.zeros((3, 8))}
    (value, found), gradient = mean_of("masked", b, parameters(), Settings(4))
    assert value == 0 and found["loss"][1] == 0
    assert all(not np.any(x) for x in jax.tree.leaves(gradient))


def test_chunks_without_a_masked_token_are_not_computed():
    """A chunk's logits that would be NaN do no harm where its tokens are not wanted."""
    hidden = jnp.concatenate([jnp.ones((4, 4)), jnp.full((8, 4), jnp.nan)])
    wanted = jnp.arange(12) < 3
    table, targets = parameters()["out"], jnp.zeros(12, jnp.int32)
    run = jax.jit(lambda h: losses.chunked_cross_entropy(lambda p, x: x @ p, table, h, targets, 4, 0.0, wanted)[0])
    assert np.isfinite(run(hidden)).all() and np.count_nonzero(run(hidden)) == 3


def test_pairs_weigh_as_many_tokens_as_a_row_has_to_predict():
    b = batch() | {"labels": jnp.array([1, 0, 1]), "label_weights": jnp.array([1.0, 1.0, 0.0])}
    params = parameters()
    (_, found), _ = mean_of("masked", b, params, Settings(4, masked_share=0.25))
    plain = mean_of("masked", batch(), params, Settings(4))[0][1]["loss"]
    logits = np.asarray(params["table"][b["tokens"][:, 0]] @ params["pair"], np.float64)
    nats = np.log(np.exp(logits).sum(-1)) - logits[np.arange(3), [1, 0, 1]]
    np.testing.assert_allclose(found["next_sentence"][0] / found["next_sentence"][1], nats[:2].mean(), rtol=1e-5)
    np.testing.assert_allclose(found["loss"][0] - plain[0], 0.25 * 8 * nats[:2].sum(), rtol=1e-5)
    assert found["loss"][1] == plain[1]
    right = (logits.argmax(-1) == [1, 0, 1])[:2]
    assert found["next_sentence_accuracy"] == (right.sum(), 2)


def test_the_balance_and_router_of_experts_count_means_by_what_the_loss_weighs():
    b, params = batch(), parameters()
    aux = {"balance": (jnp.float32(30.0), jnp.float32(20.0)), "router_z": (jnp.float32(80.0), jnp.float32(20.0))}
    (_, found), _ = mean_of("causal", b, params, Settings(balance_weight=0.1, router_z_weight=0.2), aux)
    (_, plain), _ = mean_of("causal", b, params)
    more = 0.1 * 1.5 + 0.2 * 4.0
    np.testing.assert_allclose(found["loss"][0] - plain["loss"][0], more * b["weights"].sum(), rtol=1e-4)


def log_sums(logits):
    return np.log(np.exp(np.asarray(logits, np.float64)).sum(-1))


@pytest.mark.parametrize("kind", ["causal", "masked", "chat", "classification", "span_qa"])
def test_the_z_loss_is_a_loss_of_its_own_beside_the_cross_entropy(kind):
    """By hand, over what the cross-entropy weighs; a validation does not have it."""
    b, params, z = batch(), parameters(), 0.01
    hidden = np.asarray(params["table"][b["tokens"]], np.float64)
    if kind == "classification":
        b |= {"labels": jnp.array([0, 1, 1]), "weights": jnp.array([1.0, 1.0, 0.0])}
        squares = log_sums(hidden.mean(1) @ params["pair"]) ** 2
    elif kind == "span_qa":
        b |= {"starts": jnp.array([1, 2, 0]), "ends": jnp.array([3, 2, 0]), "weights": jnp.array([1.0, 1.0, 0.0])}
        squares = (log_sums(np.moveaxis(hidden @ params["pair"], 2, 0)) ** 2).mean(0)
    else:
        squares = log_sums(hidden @ params["out"]) ** 2
    for chunk in (None, 4):
        (_, plain), _ = mean_of(kind, b, params, Settings(chunk))
        (_, found), _ = mean_of(kind, b, params, Settings(chunk, z_loss=z))
        total, weight = found["z_loss"]
        assert weight == b["weights"].sum() == found["loss"][1] and "z_loss" not in plain
        np.testing.assert_allclose(total, z * (squares * b["weights"]).sum(), rtol=1e-4)
        np.testing.assert_allclose(found["loss"][0] - total, plain["loss"][0], rtol=1e-5)
        rows, _ = jax.jit(losses.row_losses(Linear(), kind, chunk))(params, b)
        np.testing.assert_allclose(rows.sum(), plain["loss"][0], rtol=1e-5)


def test_classification_by_hand_and_rows_that_fill_up_a_batch():
    b = {**batch(), "labels": jnp.array([0, 1, 1]), "weights": jnp.array([1.0, 1.0, 0.0])}
    params = parameters()
    (value, found), _ = mean_of("classification", b, params)
    logits = np.asarray(params["table"][b["tokens"]].mean(1) @ params["pair"], np.float64)
    nats = np.log(np.exp(logits).sum(-1)) - logits[np.arange(3), [0, 1, 1]]
    np.testing.assert_allclose(value, nats[:2].mean(), rtol=1e-5)
    assert found["accuracy"] == ((logits.argmax(-1) == [0, 1, 1])[:2].sum(), 2)


def test_answers_never_lie_in_padding():
    b = batch() | {"starts": jnp.array([1, 2, 0]), "ends": jnp.array([3, 2, 0]), "weights": jnp.ones(3)}
    b["segments"] = (jnp.arange(8) < 5).astype(jnp.int32) * jnp.ones((3, 1), jnp.int32)
    params = parameters()
    (value, _), _ = mean_of("span_qa", b, params)
    hidden = np.asarray(params["table"][b["tokens"]], np.float64)[:, :5]
    nats = []
    for side, places in enumerate((b["starts"], b["ends"])):
        logits = hidden @ np.asarray(params["pair"])[:, side]
        nats.append(np.log(np.exp(logits).sum(-1)) - logits[np.arange(3), np.asarray(places)])
    np.testing.assert_allclose(value, np.mean(nats), rtol=1e-5)


def test_contrastive_loss_by_hand_leaves_out_rows_without_weight():
    first, second = batch(seed=3), batch(seed=4)
    b = {**first, "weights": jnp.array([1.0, 1.0, 0.0]), "source_tokens": second["tokens"]}
    b |= {"source_segments": second["segments"]}
    params = parameters()
    (value, found), gradient = mean_of("contrastive", b, params, Settings(temperature=0.5))

    def vectors(tokens):
        mean = np.asarray(params["table"], np.float64)[np.asarray(tokens)].mean(1)
        return mean / np.linalg.norm(mean, axis=-1, keepdims=True)

    cosines = (vectors(first["tokens"]) @ vectors(second["tokens"]).T / 0.5)[:2, :2]
    both = [np.log(np.exp(x).sum(-1)) - np.diag(x) for x in (cosines, cosines.T)]
    np.testing.assert_allclose(value, np.mean(both), rtol=1e-5)
    np.testing.assert_array_equal(found["accuracy"][0], (cosines.argmax(-1) == [0, 1]).sum())
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))


def test_the_settings_of_a_run_reach_its_loss():
    training = TrainingSpec(
        loss_chunk=4, label_smoothing=0.1, balance_weight=0.2, router_z_weight=0.05, temperature=0.3, z_loss=0.01
    )
    found = losses.settings(ObjectiveSpec(kind="masked", mask_rate=0.2), training)
    assert found == Settings(4, 0.1, 0.2, 0.05, 0.3, 0.2, z_loss=0.01)


def test_every_objective_of_the_data_has_a_loss():
    from llm.data.spec import OBJECTIVES as KINDS

    assert set(OBJECTIVES) == set(KINDS)
