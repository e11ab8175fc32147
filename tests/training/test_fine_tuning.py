"""Averages of parameters, warm starts and adapters: their arithmetic in float64, and as a user runs them.

Bit-equality here: one CPU device, float32, jitted, same batch shape, dropout on.
"""

import json
import shutil

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from llm import config, sharding
from llm.errors import InputError
from llm.models import build
from llm.models.gpt import GPTSpec
from llm.sharding import MeshSpec
from llm.training import optimizer, state
from llm.training.adapters import Adapters
from llm.training.checkpoint import Retention
from llm.training.loop import recipe
from llm.training.restore import open_weights
from llm.training.spec import OptimizerSpec, TrainingSpec
from llm.training.step import train_step
from tests.helpers import assert_refused_last, tiny, verb


def arrays(workdir, step, part):
    """A part of a checkpoint, by path."""
    saved = ocp.StandardCheckpointer().restore(workdir / "checkpoints" / str(step) / "state")[part]
    return {path: np.asarray(x) for path, x in flax.traverse_util.flatten_dict(saved, sep="/").items()}


def by_path(params):
    return {path: np.asarray(x) for path, x in flax.traverse_util.flatten_dict(params, sep="/").items()}


# --- averages ---------------------------------------------------------------------------------------------------------


def test_the_average_is_the_recurrence_and_ignores_skipped_steps():
    spec = OptimizerSpec(0.1, warmup_steps=0)
    opt, zero = optimizer.build(spec, 100), jnp.zeros((), jnp.int32)
    params = {"final_norm": {"scale": jnp.array([1.0, -2.0])}}
    start = state.TrainState(
        zero, zero, zero, params, opt.init(params), jax.random.key(0), ema=jax.tree.map(jnp.copy, params)
    )

    def loss(params, batch, key):
        del key
        return {"loss": (jnp.sum(params["final_norm"]["scale"] * batch["x"]), jnp.float32(1))}

    schedule = optimizer.schedule(spec, 100)
    step = jax.jit(
        lambda s, b: train_step(s, b, loss=loss, optimizer=opt, schedule=schedule, clip_norm=1.0, ema_decay=0.2)
    )
    s, average = start, np.array([1.0, -2.0])
    for n, x in enumerate([1.0, 2.0, np.nan, 3.0, -1.0]):
        s, _ = step(s, {"x": jnp.full(2, x)})
        if n != 2:
            made = n if n < 2 else n - 1
            decay = min(0.2, (1 + made) / (10 + made))
            average = decay * average + (1 - decay) * np.float64(s.params["final_norm"]["scale"])
        np.testing.assert_allclose(s.ema["final_norm"]["scale"], average, rtol=1e-6)
    assert np.abs(average - s.params["final_norm"]["scale"]).max() > 1e-3


SHORT = (
    "training.steps=4", "training.checkpoint_every=2", "training.validate_every=10", "training.microbatches=1",
    "optimizer.warmup_steps=1", "generation.prompts=()",
)  # fmt: skip


@pytest.fixture(scope="module")
def averaged(corpus, tmp_path_factory):
    """A finished run that kept an average, with checkpoints of steps 2 and 4."""
    workdir = tmp_path_factory.mktemp("averaged") / "run"
    result = verb("train", *tiny(corpus, workdir, *SHORT, "training.ema_decay=0.9"))
    assert result.returncode == 0, result.stderr
    return workdir


def weights(workdir, average=1):
    """The parameters of a run, and what was said of them."""
    experiment, said = config.read(workdir / "config.json"), []
    model = build(experiment.model, experiment.tokenizer.vocab_size)
    made_of = recipe(model, experiment.training, experiment.optimizer, experiment.objective, experiment.seed)
    return open_weights(made_of, sharding.make_mesh(MeshSpec()), workdir, Retention(1), said.append, average), said


@pytest.mark.long
def test_a_resumed_run_has_the_same_average(averaged, corpus, tmp_path):
    workdir = shutil.copytree(averaged, tmp_path / "resumed")
    (workdir / "summary.json").unlink()
    shutil.rmtree(workdir / "checkpoints" / "4")
    result = verb("train", *tiny(corpus, workdir, *SHORT, "training.ema_decay=0.9"))
    assert result.returncode == 0 and "resuming at step 2 of 4" in result.stdout, result.stderr
    for path, x in arrays(averaged, 4, "ema").items():
        np.testing.assert_array_equal(arrays(workdir, 4, "ema")[path], x, err_msg=path)
        assert (x != arrays(averaged, 4, "params")[path]).any(), path
    old, new = (json.loads((folder / "summary.json").read_text()) for folder in (averaged, workdir))
    assert old["validation"] == new["validation"]


def test_who_opens_a_run_takes_its_average(averaged):
    opened, said = weights(averaged)
    assert said == [f"{averaged}: the moving average of its parameters is taken (training.ema_decay=0.9)"]
    for path, x in arrays(averaged, 4, "ema").items():
        np.testing.assert_array_equal(by_path(opened.read())[path], x)


def test_the_mean_of_checkpoints(averaged):
    opened, said = weights(averaged, average=2)
    assert said[-1] == f"{averaged}: the mean of the checkpoints of steps 2, 4 is taken"
    both = [arrays(averaged, step, "ema") for step in (2, 4)]
    for path, x in by_path(opened.read()).items():
        mean = (np.float64(both[0][path]) + both[1][path]) / 2
        np.testing.assert_allclose(x, mean, rtol=1e-6, atol=1e-9)
        np.testing.assert_array_equal(opened.read_array(path), x)
    for average, message in {3: "holds 2 complete checkpoints; .* training.keep_checkpoints", 0: "at least 1"}.items():
        with pytest.raises(InputError, match=f"--average={average}.* {message}"):
            weights(averaged, average)


# --- adapters ---------------------------------------------------------------------------------------------------------

ADAPTERS = Adapters(rank=3, alpha=6.0, targets=("attention", "mlp"))


@pytest.fixture(scope="module")
def adapted():
    """Parameters with adapters in their boxes."""
    model = build(GPTSpec(vocab_size=19, context=8, layers=2, width=16, heads=4, kv_heads=2))
    return state.Recipe(model, optax.identity(), adapters=ADAPTERS)


def test_fresh_adapters_change_nothing_and_merged_ones_are_w_plus_a_b(adapted):
    params = jax.jit(lambda: adapted.create(nn.unbox).params)()
    plain = jax.jit(lambda: state.Recipe(adapted.model, optax.identity()).create(nn.unbox).params)()
    fresh = by_path(jax.jit(ADAPTERS.merge)(params))
    assert fresh.keys() == by_path(plain).keys()
    for path, x in by_path(plain).items():
        np.testing.assert_array_equal(fresh[path], x)
    a = params["lora"]["stack"]["layers"]["mlp"]["down"]["kernel"]["a"]
    assert a.shape == (2, 64, 3) and abs(np.std(a) - 1 / 8) < 0.02
    rng = np.random.default_rng(0)
    params["lora"] = jax.tree.map(lambda x: jnp.float32(rng.normal(size=x.shape)), params["lora"])
    merged = by_path(jax.jit(ADAPTERS.merge)(params))
    lora = by_path(params["lora"])
    products = {"query": "ldr,lrnh->ldnh", "output": "lnhr,lrd->lnhd", "down": "lfr,lrd->lfd"}
    for path, x in by_path(plain).items():
        if f"{path}/a" not in lora:
            assert "kernel" not in path
            np.testing.assert_array_equal(merged[path], x)
        elif (name := path.split("/")[-2]) in products:
            product = np.einsum(products[name], np.float64(lora[f"{path}/a"]), lora[f"{path}/b"])
            np.testing.assert_allclose(merged[path], x + 6 / 3 * product, rtol=1e-5, atol=1e-5, err_msg=path)


def test_gradients_of_adapters_are_those_of_the_product():
    """For the loss sum(G * (W + s A B)): s G B^T of A, s A^T G of B."""
    rng = np.random.default_rng(0)
    w, g, a, b = (rng.normal(size=shape) for shape in ((1, 5, 7), (1, 5, 7), (1, 5, 3), (1, 3, 7)))
    rates = optimizer.of_adapters(OptimizerSpec())

    def loss(params):
        merged = ADAPTERS.merge(optimizer.stop_frozen(rates, params))
        return jnp.sum(g * merged["layers"]["mlp"]["up"]["kernel"])

    params = {
        "layers": {"mlp": {"up": {"kernel": w}}},
        "lora": {"layers": {"mlp": {"up": {"kernel": {"a": a, "b": b}}}}},
    }
    found = by_path(jax.jit(jax.grad(loss))(jax.tree.map(jnp.float32, params)))
    np.testing.assert_allclose(found["lora/layers/mlp/up/kernel/a"][0], 2 * g[0] @ b[0].T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found["lora/layers/mlp/up/kernel/b"][0], 2 * a[0].T @ g[0], rtol=1e-5, atol=1e-5)
    assert not found["layers/mlp/up/kernel"].any()


def test_only_adapters_have_moments(adapted):
    opt = optimizer.build(optimizer.of_adapters(OptimizerSpec()), 1000)
    params = jax.eval_shape(lambda: adapted.create(nn.unbox).params)
    trained = sum(x.size for x in jax.tree.leaves(params["lora"]))
    assert sum(x.size for x in jax.tree.leaves(jax.eval_shape(opt.init, params))) == 2 * trained + 2  # and two counts


@pytest.fixture(scope="module")
def adapted_run(averaged, corpus, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("adapted") / "run"
    rates = "optimizer.rates=*/mlp/up/*=1"
    result = verb("train", *tiny(corpus, workdir, *SHORT, *started(averaged), "training.lora_rank=2", rates))
    assert result.returncode == 0, result.stderr
    return workdir, result.stdout


def started(run):
    return f"training.start_from={run}", f"tokenizer.path={run}/tokenizer.json"


def test_a_run_of_adapters_opens_as_any_other(adapted_run, averaged):
    workdir, printed = adapted_run
    assert f"starting from {averaged}, step 4: 10 of 18 parameter arrays; new are the adapters" in printed
    # Of rank 2, in two layers: queries and outputs of 32 x 32, keys and values of 32 x 16; and the mlp that rates name.
    count = 2 * 2 * 2 * (64 + 48)
    assert f"trained are {count + 2 * 32 * 128:,} of {32_288 + count:,} parameters" in printed
    before, after = arrays(averaged, 4, "ema"), arrays(workdir, 4, "params")
    for path, x in before.items():
        assert (after[path] == x).all() == ("/mlp/up/" not in path), path
    opened, _ = weights(workdir)
    merged, query = by_path(opened.read()), "stack/layers/attention/query/kernel"
    assert merged.keys() == before.keys()
    a, b = (np.float64(after[f"lora/{query}/{part}"]) for part in "ab")
    expected = np.float64(before[query]) + 16 / 2 * np.einsum("ldr,lrnh->ldnh", a, b)
    assert np.abs(b).max() > 0
    np.testing.assert_allclose(merged[query], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(opened.read_array(query), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(opened.read_array("embed/table"), before["embed/table"])
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["parameters"] == 32_288
    written = verb("generate", f"--workdir={workdir}", "--prompt=She was", "--max-tokens=4", "--average=2")
    assert written.returncode == 0 and "the mean of the checkpoints of steps 2, 4 is taken" in written.stderr
    scored = verb("evaluate", f"--workdir={workdir}")
    assert scored.returncode == 0, scored.stderr
    found = json.loads((workdir / "evaluation.json").read_text())["validation"]["loss"]
    np.testing.assert_allclose(found, summary["validation"]["loss"], rtol=1e-6)


def test_adapters_without_a_start_or_with_a_fresh_frozen_part_are_refused(averaged, corpus, tmp_path):
    with pytest.raises(InputError, match="training.lora_rank=2: adapters need trained parameters"):
        TrainingSpec(lora_rank=2)
    with pytest.raises(InputError, match="training.lora_alpha=8.0: nothing reads it without training.lora_rank"):
        TrainingSpec(lora_alpha=8.0)
    with pytest.raises(InputError, match="training.lora_targets: there is no role 'atention'"):
        TrainingSpec(lora_rank=2, start_from="x", lora_targets=("atention",))
    untied = verb(
        "train", *tiny(corpus, tmp_path / "a", *started(averaged), "training.lora_rank=2", "model.tied=false")
    )
    assert_refused_last(
        untied,
        "lacks unembedding_projection/kernel, which would be frozen",
        "optimizer.rates='unembedding_projection/*=1'",
    )
