"""The pure train step and its parts, by arithmetic: losses, accumulation, clipping, skipping, schedule, decay."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llm import sharding
from llm.errors import InputError
from llm.models import build
from llm.models.contract import Output
from llm.models.gpt import GPTSpec
from llm.nn.parameter import parameter
from llm.sharding import MeshSpec
from llm.training import losses, optimizer, roles, state
from llm.training.spec import OptimizerSpec
from llm.training.step import compile_train_step, put_batch, train_step
from tests.quick import quick

SPEC = OptimizerSpec(learning_rate=0.1, warmup_steps=0, weight_decay=0.0, clip_norm=None)


# --- losses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("z", [0.0, 0.3])
@pytest.mark.parametrize("chunk", [None, 1, 4, 5, 13, 64])
def test_chunked_cross_entropy_and_z_loss_equal_float64(chunk, z):
    rng = np.random.default_rng(0)
    hidden, table = rng.normal(size=(13, 6)), rng.normal(size=(11, 6))
    targets, weights = rng.integers(0, 11, 13), rng.random(13)

    def loss(table, hidden):
        nats, z_terms = losses.chunked_cross_entropy(
            lambda p, h: h @ p.T, table, hidden, jnp.asarray(targets), chunk, z_loss=z
        )
        assert (z_terms is None) == (z == 0)
        z_terms = jnp.zeros(13) if z_terms is None else z_terms
        return jnp.sum((nats + z_terms) * weights), (nats, z_terms)

    run = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    (_, (nats, z_terms)), (dtable, dhidden) = run(jnp.float32(table), jnp.float32(hidden))
    logits = hidden @ table.T
    log_sums = np.log(np.exp(logits).sum(-1))
    p = np.exp(logits - log_sums[:, None])
    # The log-sum-exp changes with each logit by its probability.
    d = (p - np.eye(11)[targets] + z * 2 * log_sums[:, None] * p) * weights[:, None]
    np.testing.assert_allclose(z_terms, z * log_sums**2, atol=1e-5)
    np.testing.assert_allclose(nats, -np.log(p[np.arange(13), targets]), atol=1e-5)
    np.testing.assert_allclose(dtable, d.T @ hidden, atol=1e-5)
    np.testing.assert_allclose(dhidden, d @ table, atol=1e-5)


def test_chunked_loss_never_holds_all_logits():
    def temporary(tokens, chunk):
        f = jax.grad(lambda t, h: losses.chunked_cross_entropy(lambda p, x: x @ p.T, t, h, jnp.zeros(tokens, int), chunk)[0].sum())  # fmt: skip  # noqa: E501
        args = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((5000, 8), (tokens, 8)))
        return jax.jit(f).lower(*args).compile().memory_analysis().temp_size_in_bytes

    assert temporary(2048, 128) < 2.2 * temporary(1024, 128)
    assert temporary(2048, None) > 5 * temporary(2048, 128)


# --- the step on a model small enough to do by hand -------------------------------------------------------------------


def linear_loss(params, batch, key):
    del key
    errors = batch["x"] @ params["mlp"]["up"]["kernel"] - batch["y"]
    return {"loss": (jnp.sum(errors**2 * batch["weights"]), batch["weights"].sum())}


def start(kernel):
    params = {"stack": {"layers": {"mlp": {"up": {"kernel": jnp.asarray(kernel, jnp.float32)}}}}}
    return params


def small_state(opt, kernel=(1.0, -2.0)):
    params = start(kernel)
    zero = jnp.zeros((), jnp.int32)
    return state.TrainState(zero, zero, zero, params, opt.init(params), jax.random.key(0))


def small_step(opt, spec=SPEC, microbatches=1, loss=None):
    def wrapped(params, batch, key):
        return (loss or linear_loss)(params["stack"]["layers"], batch, key)

    return jax.jit(
        lambda s, b: train_step(
            s, b, loss=wrapped, optimizer=opt, schedule=optimizer.schedule(spec, 100),
            clip_norm=spec.clip_norm, microbatches=microbatches,
        )
    )  # fmt: skip


def ragged(rows=8, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 5, 2)).astype(np.float32)
    weights = (np.arange(5) < rng.integers(1, 6, rows)[:, None]).astype(np.float32)
    weights[3] = 0  # a row with nothing to train on
    return {"x": x, "y": rng.normal(size=(rows, 5)).astype(np.float32), "weights": weights}


def test_one_step_is_adam_on_the_weighted_mean():
    opt = optimizer.build(SPEC, 100)
    batch = ragged()
    after, metrics = small_step(opt)(small_state(opt), batch)
    kernel = np.array([1.0, -2.0])
    errors = batch["x"] @ kernel - batch["y"]
    gradient = np.einsum("bt,btd->d", 2 * errors * batch["weights"], batch["x"]) / batch["weights"].sum()
    got = after.params["stack"]["layers"]["mlp"]["up"]["kernel"]
    np.testing.assert_allclose(got, kernel - 0.1 * np.sign(gradient), atol=1e-5)
    np.testing.assert_allclose(
        metrics["loss"], (errors**2 * batch["weights"]).sum() / batch["weights"].sum(), rtol=1e-5
    )
    np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(gradient), rtol=1e-5)
    assert metrics["weight"] == batch["weights"].sum() and metrics["learning_rate"] == np.float32(0.1)
    np.testing.assert_allclose(metrics["update_norm/mlp"], np.linalg.norm(np.float64(got) - kernel), rtol=1e-5)


def test_micro_batches_of_unlike_weight():
    """10 tokens of mean loss 4 and 100 of mean loss 1 make 140/110, not 2.5; an empty part adds nothing."""
    opt = optimizer.build(SPEC, 100)

    def given(params, batch, key):
        del key
        value = (batch["mean"] * batch["count"]).sum() + 0 * params["mlp"]["up"]["kernel"].sum()
        return {"loss": (value, batch["count"].sum())}

    batch = {"mean": jnp.array([4.0, 1.0, 7.0]), "count": jnp.array([10.0, 100.0, 0.0])}
    _, metrics = small_step(opt, microbatches=3, loss=given)(small_state(opt), batch)
    np.testing.assert_allclose(metrics["loss"], 140 / 110, rtol=1e-6)


@pytest.mark.parametrize("microbatches", [2, 4, 8])
def test_micro_batches_change_nothing(microbatches):
    spec = dataclasses.replace(SPEC, clip_norm=0.5)
    opt = optimizer.build(spec, 100)
    results = []
    for k in (1, microbatches):
        s, step = small_state(opt), small_step(opt, spec, k)
        for seed in range(3):
            s, metrics = step(s, ragged(seed=seed))
        results.append((s.params, metrics["loss"], metrics["grad_norm"], metrics["weight"]))
    for a, b in zip(jax.tree.leaves(results[0]), jax.tree.leaves(results[1])):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_batch_that_is_all_padding_changes_no_parameter():
    opt = optimizer.build(SPEC, 100)
    batch = {**ragged(), "weights": np.zeros((8, 5), np.float32)}
    after, metrics = small_step(opt)(small_state(opt), batch)
    assert metrics["loss"] == 0 and metrics["weight"] == 0 and metrics["skipped"] == 0
    np.testing.assert_array_equal(after.params["stack"]["layers"]["mlp"]["up"]["kernel"], [1.0, -2.0])


def test_clipping():
    clip = jax.jit(lambda g, n: optimizer.clip_by_norm(g, optax.tree.norm(g), n))
    np.testing.assert_array_equal(clip({"a": jnp.zeros(2)}, 0.0)["a"], 0)
    np.testing.assert_array_equal(clip({"a": jnp.ones(2)}, 0.0)["a"], 0)
    np.testing.assert_allclose(clip({"a": jnp.array([3.0, 4.0])}, 1.0)["a"], [0.6, 0.8], rtol=1e-6)
    np.testing.assert_array_equal(clip({"a": jnp.array([0.3, 0.4])}, 1.0)["a"], np.float32([0.3, 0.4]))


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e25])
def test_a_step_without_a_finite_gradient_changes_only_the_counters(bad):
    spec = dataclasses.replace(SPEC, warmup_steps=4, clip_norm=1.0)
    opt = optimizer.build(spec, 100)
    step = small_step(opt, spec)
    s, _ = step(small_state(opt), ragged())
    poisoned = ragged(seed=1)
    poisoned["x"][0, 0] = bad
    poisoned["weights"][0, 0] = 1
    skipped, metrics = step(s, poisoned)
    assert metrics["skipped"] == 1 and metrics["skipped_in_a_row"] == 1 and metrics["update_norm/mlp"] == 0
    assert (int(skipped.step), int(skipped.skipped), int(skipped.skipped_in_a_row)) == (2, 1, 1)
    for a, b in zip(jax.tree.leaves((s.params, s.opt_state)), jax.tree.leaves((skipped.params, skipped.opt_state))):
        np.testing.assert_array_equal(a, b)
    after, metrics = step(skipped, ragged(seed=2))
    assert int(after.skipped_in_a_row) == 0 and int(after.skipped) == 1
    np.testing.assert_allclose(metrics["learning_rate"], 0.1 * 1 / 4, rtol=1e-6)  # the second update, not the third
    before, moved = (jnp.concatenate([x.ravel() for x in jax.tree.leaves(one.params)]) for one in (skipped, after))
    np.testing.assert_allclose(metrics["update_norm/mlp"], np.linalg.norm(moved - before), rtol=1e-3)


@pytest.mark.long
def test_bfloat16_is_of_activations_alone():
    """The policy of `llm.nn`: losses near float32's; parameters, gradients, moments and the average in float32."""
    spec, found = dataclasses.replace(SPEC, learning_rate=0.01), {}
    tokens = np.random.default_rng(0).integers(0, 19, (4, 9)).astype(np.int32)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": np.ones((4, 8), np.float32)}
    batch["segments"] = np.ones((4, 8), np.int32)
    for dtype in ("float32", "bfloat16"):
        recipe = state.Recipe(model(dtype=dtype), optimizer.build(spec, 10), ema_decay=0.9)
        loss, s = losses.next_token(recipe.model, 8), quick(lambda r=recipe: r.create(unbox=nn.unbox))()
        gradients = jax.eval_shape(jax.grad(lambda p, f=loss: f(p, batch)["loss"][0]), s.params)
        step = quick(
            functools.partial(
                train_step, loss=loss, optimizer=recipe.optimizer, schedule=lambda n: n, clip_norm=1.0, ema_decay=0.9
            )
        )
        values = []
        for _ in range(3):
            s, metrics = step(s, batch)
            values.append(metrics["loss"])
        kept = jax.tree.leaves((s.params, s.ema, s.opt_state, gradients, metrics))
        assert {x.dtype for x in kept if jnp.issubdtype(x.dtype, jnp.floating)} == {jnp.dtype(jnp.float32)}
        found[dtype] = np.array(values)
    assert (np.diff(found["float32"]) < 0).all()
    np.testing.assert_allclose(found["bfloat16"], found["float32"], rtol=0.02)
    assert (found["bfloat16"] != found["float32"]).all()


# --- schedule, decay, sharding ----------------------------------------------------------------------------------------


def test_schedule_at_its_corners():
    spec = OptimizerSpec(learning_rate=1.0, warmup_steps=100, final_fraction=0.0)
    rate = optimizer.schedule(spec, 1000)
    np.testing.assert_allclose([rate(n) for n in (0, 50, 100, 550, 1000, 5000)], [0, 0.5, 1, 0.5, 0, 0], atol=1e-6)
    assert optimizer.schedule(dataclasses.replace(spec, warmup_steps=0), 1000)(0) == 1.0
    rates = np.array([rate(n) for n in range(1001)])
    assert (np.diff(rates[:101]) > 0).all() and (np.diff(rates[100:]) <= 0).all()
    for warmup in (1000, 2000):
        with pytest.raises(InputError, match="must be less than training.steps=1000"):
            optimizer.schedule(dataclasses.replace(spec, warmup_steps=warmup), 1000)


def test_the_schedule_counts_updates_not_micro_batches():
    spec = dataclasses.replace(SPEC, warmup_steps=10)
    opt = optimizer.build(spec, 100)
    s, step = small_state(opt), small_step(opt, spec, microbatches=4)
    for _ in range(2):  # eight micro-steps
        s, metrics = step(s, ragged())
    np.testing.assert_allclose(metrics["learning_rate"], 0.1 * 1 / 10, rtol=1e-6)
    assert int(s.step) == 2 and int(s.opt_state[-1].count) == 2


def model(**more):
    return build(GPTSpec(vocab_size=19, context=8, layers=2, width=16, heads=2, bias=True, norm="layer", tied=False,
                         position="learned", qk_norm=True, **more))  # fmt: skip


def test_matrices_decay_and_vectors_do_not():
    mesh = sharding.make_mesh(MeshSpec())
    opt = optimizer.build(dataclasses.replace(SPEC, weight_decay=0.5), 10)
    s = state.create(state.Recipe(model(), opt), mesh)
    zeros = jax.tree.map(jnp.zeros_like, s.params)
    updates, _ = opt.update(zeros, s.opt_state, s.params)
    for (path, update), p in zip(jax.tree_util.tree_leaves_with_path(updates), jax.tree.leaves(s.params)):
        name = roles.path_name(path)
        decays = name.endswith(("kernel", "table"))
        np.testing.assert_allclose(update, -0.1 * 0.5 * p if decays else 0 * p, atol=1e-7, err_msg=name)


def test_a_parameter_without_a_role_is_an_error():
    with pytest.raises(ValueError, match="parameter stack/new/thing has no role"):
        roles.role("stack/new/thing")
    with pytest.raises(ValueError, match="logical axis 'nowhere' has no rule"):
        sharding.partition_spec(("nowhere",))


class Plain(nn.Module):
    """A model with a parameter that was made without the names of its axes."""

    carries = False

    @nn.compact
    def __call__(self, batch, train=False):
        table = parameter(self, "table", nn.initializers.ones, ("vocab", "embed"), (4, 2))
        return Output((table * self.param("forgotten", nn.initializers.ones, (2,)))[batch["tokens"]])

    def unembed(self, hidden_BTD):
        return hidden_BTD


def test_a_parameter_without_the_names_of_its_axes_is_an_error():
    recipe, mesh = state.Recipe(Plain(), optax.identity()), sharding.make_mesh(MeshSpec())
    for use in (state.state_shardings, state.check_mesh, state.create):
        with pytest.raises(ValueError, match="parameter forgotten does not name its axes.*llm.nn.parameter"):
            use(recipe, mesh)


def test_the_parameter_table_covers_every_parameter():
    table = state.parameter_table(state.Recipe(model(), optax.identity()), SPEC)
    assert "stack/layers/attention/query/kernel" in table and "layers embed heads head_width" in table
    names = [line.split()[0] for line in table.splitlines()[1:-1]]
    mesh = sharding.make_mesh(MeshSpec())
    params = state.create(state.Recipe(model(), optimizer.build(SPEC, 10)), mesh).params
    assert names == [roles.path_name(p) for p, _ in jax.tree_util.tree_leaves_with_path(params)]
    assert table.splitlines()[-1] == f"{state.count_parameters(params):,} parameters"


def test_the_state_is_donated():
    mesh = sharding.make_mesh(MeshSpec())
    opt = optimizer.build(SPEC, 10)
    m = model()
    with jax.set_mesh(mesh):
        recipe = state.Recipe(m, opt)
        s = state.create(recipe, mesh)
        step = compile_train_step(
            mesh, state.state_shardings(recipe, mesh), loss=losses.next_token(m, None), optimizer=opt,
            schedule=optimizer.schedule(SPEC, 10), clip_norm=1.0,
        )  # fmt: skip
        batch = {k: np.ones((2, 8), np.int32) for k in ("tokens", "targets", "segments", "positions")}
        batch["weights"] = np.ones((2, 8), np.float32)
        step(s, put_batch(mesh, batch))
    assert all(x.is_deleted() for x in jax.tree.leaves(s.params))


# --- keys and weights -------------------------------------------------------------------------------------------------


def test_every_step_and_micro_batch_has_its_own_dropout_key():
    opt = optimizer.build(SPEC, 100)

    def draw(params, batch, key):
        zero = 0 * params["mlp"]["up"]["kernel"].sum()
        return {"loss": (jax.random.uniform(key) * len(batch["x"]) + zero, jnp.float32(len(batch["x"])))}

    one, two = small_step(opt, loss=draw), small_step(opt, loss=draw, microbatches=2)
    first, m0 = one(small_state(opt), ragged())
    _, m1 = one(first, ragged())
    _, again = one(small_state(opt), ragged())
    _, halves = two(small_state(opt), ragged())
    assert m0["loss"] == again["loss"] != m1["loss"]
    second_half = 2 * halves["loss"] - m0["loss"]  # micro-batch 0 has the key of the whole batch
    assert abs(second_half - m0["loss"]) > 1e-3


@pytest.mark.parametrize("chunk", [None, 8])
def test_padding_counts_neither_in_the_loss_nor_in_the_gradient(chunk):
    m = model()
    params = state.create(state.Recipe(m, optimizer.build(SPEC, 10)), sharding.make_mesh(MeshSpec())).params
    loss = losses.next_token(m, chunk)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 19, (2, 8)).astype(np.int32)
    targets = rng.integers(0, 19, (2, 8)).astype(np.int32)
    real = np.arange(8) < np.array([[8], [5]])

    def batch(tokens, targets):
        return {
            "tokens": tokens, "targets": targets, "weights": real.astype(np.float32), "segments": real.astype(np.int32),
        }  # fmt: skip

    run = jax.jit(jax.value_and_grad(lambda p, b: loss(p, b)["loss"], has_aux=True))
    (nats, weight), gradient = run(params, batch(tokens, targets))
    assert weight == 13
    other = batch(np.where(real, tokens, 7), np.where(real, targets, 3))
    (nats_other, _), gradient_other = run(params, other)
    assert nats == nats_other
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(gradient_other)):
        np.testing.assert_array_equal(a, b)
    per_row, _ = jax.jit(losses.row_losses(m, "causal", chunk))(params, batch(tokens, targets))
    np.testing.assert_allclose(nats, np.asarray(per_row, np.float64).sum(), rtol=1e-6)
