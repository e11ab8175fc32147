"""Packed parameters in a model, straight programs, and `llm.generate --weights`."""

import dataclasses
import json
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llm.compression.packing import pack_params
from llm.models import EncDecSpec, GPTSpec, RNNSpec, T5Spec, build, unrolled
from llm.nn.packed import Packed, unpack
from llm.training.state import Recipe
from tests import helpers

SPECS = {
    "gpt": GPTSpec(vocab_size=40, context=64, layers=2, width=64, heads=2, kv_heads=1, gated=True, tied=False),
    "learned": GPTSpec(vocab_size=40, context=32, layers=2, width=32, heads=2, position="learned", bias=True),
    "rnn": RNNSpec(vocab_size=40, width=32),
    "encdec": EncDecSpec(vocab_size=40, layers=1, width=32, heads=2, ff_width=64),
    "t5": T5Spec(vocab_size=40, layers=1, width=32, heads=2, ff_width=64),
}


def fresh(model):
    objective = "seq2seq" if model.reads_source else "causal"
    return Recipe(model, optax.identity(), objective).create(nn.unbox).params


def restored(packed_params, params):
    """Packed matrices as floats of the model's own shapes."""

    def one(packed, x):
        if not isinstance(packed, Packed):
            return packed
        matrix = unpack(packed)
        return (matrix if matrix.shape == x.shape else matrix.swapaxes(-1, -2)).reshape(x.shape)

    return jax.tree.map(one, packed_params, params, is_leaf=lambda x: isinstance(x, Packed))


ALWAYS = ("gpt", 8), ("t5", 4)


@pytest.mark.parametrize("name, bits", helpers.long_but(ALWAYS, [("gpt", 8), *((name, 4) for name in SPECS)]))
def test_a_packed_model_is_the_model_of_the_rounded_weights(name, bits):
    model = build(SPECS[name])
    params = fresh(model)
    packing = pack_params(model, params, bits)
    assert not packing.kept
    leaves = jax.tree_util.tree_leaves_with_path(packing.params, is_leaf=lambda x: isinstance(x, Packed))
    names = ["/".join(key.key for key in path) for path, x in leaves if not isinstance(x, Packed)]
    # The tables of relative positions are added to scores, not multiplied with.
    assert not [name for name in names if name.endswith(("/kernel", "/table")) and "_bias/" not in name]
    if name == "gpt":
        assert packing.after < packing.before / (3 if bits == 8 else 4)
    batch = {"tokens": jnp.asarray(np.random.default_rng(0).integers(0, 40, (2, 5)))}
    if model.reads_source:
        batch["source_tokens"] = batch["tokens"]

    @jax.jit
    def logits(params):
        return model.apply({"params": params}, model.apply({"params": params}, batch).hidden_BTD, method="unembed")

    got, want = logits(packing.params), logits(restored(packing.params, params))
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert np.abs(np.asarray(want) - logits(params)).max() > 1e-4  # it does round


def test_matrices_of_odd_inputs_stay_as_they_are():
    model = build(GPTSpec(vocab_size=40, context=64, layers=1, width=48, heads=2, ff_width=64))
    packing = pack_params(model, fresh(model), 8)
    assert "stack/layers/mlp/up/kernel" in packing.kept and "stack/layers/mlp/down/kernel" not in packing.kept


@pytest.mark.long
@pytest.mark.parametrize("windows", [(), (3, 0)])
def test_a_straight_program_computes_the_same_with_a_cache_of_its_own_for_every_layer(windows):
    spec = dataclasses.replace(SPECS["gpt"], layers=4, windows=windows)
    model = build(spec)
    params = fresh(model)
    straight, apart = unrolled(model, params)
    assert jax.tree.leaves(apart["stack"])[0].shape[0] == 1

    @jax.jit
    def both(params, apart, batch, caches):
        one = model.apply({"params": params}, batch, cache=caches[0])
        other = straight.apply({"params": apart}, batch, cache=caches[1])
        return (one.hidden_BTD, one.cache), (other.hidden_BTD, other.cache)

    caches = model.init_cache(2, 16), straight.init_cache(2, 16)
    assert len(caches[1].layers) == 4
    for batch in (
        {"tokens": jnp.array([[1, 2, 3, 4, 5], [6, 7, 0, 0, 0]]), "segments": jnp.array([[1] * 5, [1, 1, 0, 0, 0]])},
        {"tokens": jnp.array([[8], [9]]), "segments": jnp.array([[1], [1]])},
        {"tokens": jnp.array([[8], [0]]), "segments": jnp.array([[1], [0]])},  # a row that has ended
        {"tokens": jnp.array([[8], [9]]), "segments": jnp.array([[1], [1]])},
    ):
        found = both(params, apart, batch, caches)
        real = np.asarray(batch["segments"]) == 1
        np.testing.assert_allclose(np.asarray(found[0][0])[real], np.asarray(found[1][0])[real], atol=1e-5)
        caches = found[0][1], found[1][1]
    np.testing.assert_array_equal(caches[0].lengths_B, caches[1].lengths_B)


def test_generate_reads_packed_weights(finished_run):
    asked = "--prompt=It is a truth", "--max-tokens=8", "--temperature=0", f"--workdir={finished_run}"
    for weights, compiler in (("int8", None), ("int4", "no-such-compiler")):
        env = {} if compiler is None else {"CXX": compiler}
        found = helpers.verb("generate", *asked, f"--weights={weights}", **env)
        assert found.returncode == 0 and found.stdout.startswith("It is a truth"), found.stderr
        line = next(line for line in found.stderr.splitlines() if line.startswith(f"weights: {weights}, "))
        assert "MB in place of" in line
        if compiler is not None:
            assert "by XLA, as there is no C++ compiler no-such-compiler" in line
        elif shutil.which("g++"):
            assert "by the compiled kernel" in line


def test_weights_that_cannot_be_are_one_line(finished_run, tmp_path):
    bad = helpers.verb("generate", f"--workdir={finished_run}", "--prompt=a", "--weights=int3")
    helpers.assert_refused(bad, "--weights", "'int3'")
    shutil.copytree(finished_run, tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    config["mesh"] |= {"cpu_devices": 2, "data": 2}
    path.write_text(json.dumps(config))
    bad = helpers.verb("generate", f"--workdir={tmp_path / 'run'}", "--prompt=a", "--weights=int8")
    helpers.assert_refused(bad, "--weights=int8 is of one device")
