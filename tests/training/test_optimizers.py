"""Update rules, schedules, factors on the rate and norms by role, against float64 by the published formulas."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llm.errors import InputError
from llm.models import build
from llm.models.gpt import GPTSpec
from llm.models.t5 import T5Spec
from llm.training import optimizer, roles, state
from llm.training.spec import OptimizerSpec
from llm.training.step import train_step
from llm.training.update_rules import orthogonalize
from tests.helpers import assert_refused, verb

# By path: the shape, the shape of each layer's matrix (None: a vector), and whether it decays. One matrix is large
# enough for Adafactor to factor its second moments.
TREE = {
    "embed/table": ((5, 4), (5, 4), True),
    "stack/layers/attention/query/kernel": ((2, 4, 2, 3), (4, 6), True),
    "stack/layers/attention/output/kernel": ((2, 2, 3, 4), (6, 4), True),
    "stack/layers/mlp/up/kernel": ((2, 128, 130), (128, 130), True),
    "stack/layers/moe/gate": ((2, 3, 4, 5), (4, 5), True),
    "stack/layers/mlp_norm/scale": ((2, 4), None, False),
    "final_norm/scale": ((4,), None, False),
}
SPEC = OptimizerSpec(learning_rate=0.01, warmup_steps=2, schedule="linear", weight_decay=0.3, clip_norm=2.0)
STEPS = 4


def nested(flat):
    tree: dict = {}
    for path, x in flat.items():
        *folders, name = path.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = x
    return tree


def flat(tree):
    return {roles.path_name(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def drawn(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {path: scale * rng.normal(size=shape) for path, (shape, _, _) in TREE.items()}


# --- the published rules, of one matrix (or vector) at a time ---------------------------------------------------------


def adamw(g, p, memory, t, path):
    del p, path
    m, v = memory.get("m", 0 * g), memory.get("v", 0 * g)
    memory["m"], memory["v"] = m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
    return m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)


def lion(g, p, memory, t, path):
    del p, t, path
    m = memory.get("m", 0 * g)
    memory["m"] = 0.95 * m + 0.05 * g
    return np.sign(0.9 * m + 0.1 * g)


def adafactor(g, p, memory, t, path):
    decay = 1 - t**-0.8
    square = g**2 + 1e-30
    if g.ndim == 2 and path != "embed/table" and min(g.shape) >= 128:
        row, column = memory.get("r", np.zeros(len(g))), memory.get("c", np.zeros(g.shape[1]))
        memory["r"] = row = decay * row + (1 - decay) * square.mean(1)
        memory["c"] = column = decay * column + (1 - decay) * square.mean(0)
        u = g / np.sqrt(np.outer(row, column) / row.mean())
    else:
        memory["v"] = v = decay * memory.get("v", 0) + (1 - decay) * square
        u = g / np.sqrt(v)
    u = u / max(1, np.sqrt((u**2).mean()))
    return max(1e-3, np.sqrt((p**2).mean())) * u


def muon(g, p, memory, t, path):
    if g.ndim == 1 or path == "embed/table":
        return adamw(g, p, memory, t, path)
    memory["m"] = m = 0.95 * memory.get("m", 0 * g) + 0.05 * g
    x = 0.05 * g + 0.95 * m
    x = x.T if g.shape[0] > g.shape[1] else x
    x = x / (np.linalg.norm(x) + 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    x = x.T if g.shape[0] > g.shape[1] else x
    return x * max(1, g.shape[1] / g.shape[0]) ** 0.5


@pytest.mark.parametrize("rule", [adamw, adafactor, lion, muon], ids=lambda rule: rule.__name__)
def test_an_update_rule_is_the_published_one(rule):
    spec = dataclasses.replace(SPEC, name=rule.__name__)
    opt = optimizer.build(spec, 10)
    start, memory = drawn(0, 0.1), {}
    params = nested({path: jnp.float32(x) for path, x in start.items()})
    opt_state = opt.init(params)

    @jax.jit
    def step(params, opt_state, gradients):
        clipped = optimizer.clip_by_norm(gradients, optax.tree.norm(gradients), spec.clip_norm)
        updates, opt_state = opt.update(clipped, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    expected = start
    for t in range(1, STEPS + 1):
        gradients = drawn(t)
        params, opt_state = step(params, opt_state, nested({path: jnp.float32(x) for path, x in gradients.items()}))
        norm = np.sqrt(sum((g**2).sum() for g in gradients.values()))
        update = t - 1
        rate = 0.01 * (update / 2 if update < 2 else 1 - 0.9 * (update - 2) / 8)
        for path, (shape, matrix, decays) in TREE.items():
            own = shape[-1:] if matrix is None else matrix
            gs, ps = (x[path].reshape(-1, *own) for x in (gradients, expected))
            new = []
            for i, (g, p) in enumerate(zip(gs, ps)):
                u = rule(g * min(1, 2 / norm), p, memory.setdefault((path, i), {}), t, path)
                new.append(p - rate * (u + 0.3 * decays * p))
            expected = expected | {path: np.stack(new).reshape(shape)}
    for path, got in flat(params).items():
        moved = np.abs(expected[path] - start[path]).max()
        np.testing.assert_allclose(got, expected[path], atol=2e-4 * moved + 1e-7, err_msg=path)


def test_orthogonal_updates():
    """Singular values after five iterations lie about 1 (Jordan et al. 2024), whatever they were before."""
    x = np.random.default_rng(0).normal(size=(3, 6, 40)) * np.array([1e-3, 1.0, 1e3])[:, None, None]
    values = np.linalg.svd(np.asarray(jax.jit(orthogonalize)(jnp.float32(x))), compute_uv=False)
    assert 0.6 < values.min() and values.max() < 1.3


def test_settings_that_nothing_reads_are_refused():
    for name, fields in {
        "adafactor": {"b1": 0.5, "b2": 0.5, "epsilon": 1e-3, "momentum": 0.5},
        "lion": {"epsilon": 1e-3, "momentum": 0.5},
        "adamw": {"momentum": 0.5, "decay_fraction": 0.5},
    }.items():
        for field, value in fields.items():
            with pytest.raises(InputError, match=f"optimizer.{field}={value}: .* does not read it; leave it at"):
                OptimizerSpec(name=name, **{field: value})
    with pytest.raises(InputError, match="optimizer.name='adam': there are adamw, adafactor, lion, muon"):
        OptimizerSpec(name="adam")


# --- schedule ---------------------------------------------------------------------------------------------------------


def test_warm_up_stable_decay_at_its_corners():
    spec = OptimizerSpec(1.0, warmup_steps=100, schedule="wsd", decay_fraction=0.2, final_fraction=0.1)
    rate = optimizer.schedule(spec, 1000)
    at = (0, 50, 100, 500, 800, 900, 1000, 5000)
    np.testing.assert_allclose([rate(n) for n in at], [0, 0.5, 1, 1, 1, 0.55, 0.1, 0.1], atol=1e-6)
    every = np.array([rate(n) for n in range(0, 1001, 10)])
    assert (np.diff(every[:11]) > 0).all() and (np.diff(every[10:]) <= 0).all()
    at_once = optimizer.schedule(dataclasses.replace(spec, warmup_steps=0, decay_fraction=1.0), 1000)
    np.testing.assert_allclose([at_once(n) for n in (0, 500, 1000)], [1, 0.55, 0.1], atol=1e-6)
    whole = optimizer.schedule(dataclasses.replace(spec, warmup_steps=800), 1000)
    np.testing.assert_allclose([whole(n) for n in (799, 800, 900)], [799 / 800, 1, 0.55], atol=1e-6)
    with pytest.raises(InputError, match="warmup_steps=801 and the decay of the last 200 updates .* do not fit"):
        optimizer.schedule(dataclasses.replace(spec, warmup_steps=801), 1000)


def test_the_other_schedules_at_their_corners():
    for name, warmup, at, want in [
        ("linear", 100, (0, 50, 100, 550, 1000, 5000), (0, 1, 2, 1.1, 0.2, 0.2)),
        ("linear", 0, (0, 500, 1000), (2, 1.1, 0.2)),
        ("inverse_sqrt", 100, (0, 25, 100, 400, 900, 10_000), (0, 0.5, 2, 1, 2 / 3, 0.2)),
        ("constant", 100, (0, 50, 100, 101, 5000), (0, 1, 2, 2, 2)),
        ("constant", 0, (0, 1, 5000), (2, 2, 2)),
    ]:
        rate = optimizer.schedule(OptimizerSpec(2.0, warmup_steps=warmup, schedule=name), 1000)
        np.testing.assert_allclose([rate(n) for n in at], want, rtol=1e-6, atol=1e-6, err_msg=f"{name} {warmup}")


# --- factors on the rate ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_frozen_parameters_stand_still_without_moments(name):
    spec = OptimizerSpec(0.1, name, warmup_steps=0, rates=("embedding=0", "*/attention/*=0", "*/query/*=0.5"))
    frozen = {"embed/table", "stack/layers/attention/output/kernel"}
    params = nested({path: jnp.float32(x) for path, x in drawn(0).items()})
    whole, opt = optimizer.build(dataclasses.replace(spec, rates=()), 10), optimizer.build(spec, 10)

    def count(opt):
        return sum(x.size for x in jax.tree.leaves(jax.eval_shape(opt.init, params)))

    assert count(whole) - count(opt) == 2 * 5 * 4 + (2 if name == "adamw" else 1) * 2 * 2 * 3 * 4

    def loss(params, batch, key):
        del batch, key
        stopped = optimizer.stop_frozen(spec, params)
        return {"loss": (sum(jnp.square(x).sum() + x.sum() for x in jax.tree.leaves(stopped)), jnp.float32(1))}

    zero = jnp.zeros((), jnp.int32)
    s = state.TrainState(zero, zero, zero, params, opt.init(params), jax.random.key(0))
    run = jax.jit(lambda s: train_step(s, {}, loss=loss, optimizer=opt, schedule=lambda n: n, clip_norm=1.0))
    after, metrics = run(run(s)[0])
    assert metrics["grad_norm/embedding"] == 0 == metrics["update_norm/embedding"]
    trained = [2 * x + 1 for path, x in flat(run(s)[0].params).items() if path not in frozen]
    norm = np.linalg.norm(np.concatenate([x.ravel() for x in trained]))  # of what is trained alone
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    for path, x in flat(after.params).items():
        assert (x == flat(params)[path]).all() == (path in frozen), path


def test_factors_scale_updates_and_layers_decay_from_the_top():
    shapes = {
        "embed/table": (5, 4),
        "embedding_norm/scale": (4,),
        "final_norm/scale": (4,),
        "stack/layers/block_0/attention/output/kernel": (2, 2, 2, 4),
        "stack/layers/block_0/mlp/up/kernel": (2, 4, 4),
        "stack/layers/block_1/mlp/up/kernel": (2, 4, 4),
    }
    params = nested({path: jnp.ones(shape) for path, shape in shapes.items()})
    plain = OptimizerSpec(0.1, warmup_steps=0)
    spec = dataclasses.replace(plain, rates=("*=2", "embedding=13.9", "attention=0.5"), layer_decay=0.9)
    found = []
    for one in (plain, spec):
        opt = optimizer.build(one, 10)
        found.append(flat(jax.jit(opt.update)(params, opt.init(params), params)[0]))
    # Of four layers, 0 and 2 are block_0, 1 and 3 are block_1; the top one has 0.9.
    expected = {
        "embed/table": 13.9 * 0.9**5,
        "embedding_norm/scale": 2 * 0.9**5,
        "final_norm/scale": 2,
        "stack/layers/block_0/attention/output/kernel": 0.5 * np.array([0.9**4, 0.9**2]),
        "stack/layers/block_0/mlp/up/kernel": 2 * np.array([0.9**4, 0.9**2]),
        "stack/layers/block_1/mlp/up/kernel": 2 * np.array([0.9**3, 0.9]),
    }
    for path, update in found[1].items():
        factor = np.reshape(expected[path], (-1, *[1] * (update.ndim - 1)))
        np.testing.assert_allclose(update, found[0][path] * factor, rtol=1e-5, err_msg=path)


def test_stacks_are_counted_each_by_itself():
    m = build(T5Spec(vocab_size=19, layers=3, decoder_layers=2, width=8, heads=2, head_width=4, ff_width=8))
    params = state.Recipe(m, optax.identity(), "seq2seq").boxed().params
    found = flat(optimizer.rate_factors(OptimizerSpec(layer_decay=0.5), nn.unbox(params)))
    np.testing.assert_allclose(found["encoder/layers/mlp/down/kernel"].ravel(), [1 / 8, 1 / 4, 1 / 2])
    np.testing.assert_allclose(found["decoder/layers/mlp/down/kernel"].ravel(), [1 / 4, 1 / 2])
    assert found["embed/table"] == 1 / 16 and found["decoder_norm/scale"] == found["encoder_bias/table"] == 1


def test_wrong_rates_are_refused_and_right_ones_shown():
    for rates, message in {
        ("embeding=2",): "there is no role 'embeding'; there are 'embedding' \\(nearest\\), adapter, norm",
        ("embedding",): "'embedding' is no role \\(or path with \\*\\), = and a factor",
        ("norm=-1",): "'norm=-1' is no role",
    }.items():
        with pytest.raises(InputError, match=message):
            OptimizerSpec(rates=rates)
    m = build(GPTSpec(vocab_size=19, context=8, layers=3, width=16, heads=2))
    recipe = state.Recipe(m, optax.identity())
    params = recipe.boxed().params
    for rates, message in {
        ("expert=2",): "no parameter of this model is 'expert'",
        ("*/mpl/*=2",): "no parameter of this model is",
        ("*=0",): "every parameter is frozen",
    }.items():
        with pytest.raises(InputError, match=message):
            optimizer.check_rates(OptimizerSpec(rates=rates), params)
    table = state.parameter_table(recipe, OptimizerSpec(rates=("embedding=8", "*/mlp/*=0"), layer_decay=0.5))
    rows = {line.split()[0]: line.split()[3:5] for line in table.splitlines()[1:-1]}
    assert rows["embed/table"] == ["0.5", "yes"] and rows["final_norm/scale"] == ["1", "no"]
    assert rows["stack/layers/attention/query/kernel"] == ["0.125..0.5", "yes"]
    assert rows["stack/layers/mlp/up/kernel"] == ["frozen", "no"]


def test_the_verb_refuses_factors_that_fit_nothing():
    rates = "--config.optimizer.rates=norm=2,expert=2"
    result = verb("train", "--config=tests/tiny.py", "--show-parameters", rates)
    assert_refused(result, "optimizer.rates: no parameter of this model is 'expert'; --show-parameters lists them")


# --- norms by role ----------------------------------------------------------------------------------------------------


def test_norms_by_role_are_those_of_their_parameters():
    params = {path: jnp.float32(x) for path, x in drawn(0).items()}
    got = jax.jit(roles.norms_by_role)(nested(params))
    by_role: dict[str, list] = {}
    for path, x in params.items():
        by_role.setdefault(roles.role(path).name, []).append(np.float64(x).ravel())
    assert got.keys() == by_role.keys() and {"attention", "norm"} <= by_role.keys()
    for name, parts in by_role.items():
        np.testing.assert_allclose(got[name], np.linalg.norm(np.concatenate(parts)), rtol=1e-6)
    assert list(roles.norms_by_role({"encoder_bias": {"table": jnp.ones(4)}})) == ["position_bias"]
