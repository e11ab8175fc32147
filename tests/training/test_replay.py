"""The first tensor of a step that is not finite, by its name: of models that were broken at a known place."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llm import sharding
from llm.models import build
from llm.models.gpt import GPTSpec
from llm.training import losses, replay, state
from llm.training.diagnostics import Saved, nearest

LAYERS = 3
MODEL = build(GPTSpec(vocab_size=32, context=8, layers=LAYERS, width=8, heads=2, dropout=0.2, remat="all"))
LOSS = losses.next_token(MODEL, 8)
MESH = sharding.make_mesh(sharding.MeshSpec())
OPTIMIZER = optax.adam(0.1)


def batch():
    rng = np.random.default_rng(0)
    found = {name: rng.integers(0, 32, (4, 8)).astype(np.int32) for name in ("tokens", "targets")}
    found["segments"] = np.ones((4, 8), np.int32)
    found["weights"] = np.ones((4, 8), np.float32)
    found["positions"] = np.tile(np.arange(8, dtype=np.int32), (4, 1))
    return found


@functools.cache
def fresh():
    """The model's parameters."""
    with jax.set_mesh(MESH):
        return state.create(state.Recipe(MODEL, OPTIMIZER), MESH).params


def first(params, loss, rows=None, moments=None):
    """(what is named, all that is said)."""
    zero = jnp.zeros((), jnp.int32)
    moments = OPTIMIZER.init(params) if moments is None else moments
    whole = state.TrainState(zero, zero, zero, params, moments, jax.random.key(0))
    said = []
    with jax.set_mesh(MESH):
        saved = Saved(1, batch() if rows is None else rows, {}, whole, 0)
        return replay.first_bad(loss, OPTIMIZER, saved, 2, 1.0, MESH, said.append), "\n".join(said)


def changed(name, change, layer):
    """Fresh parameters with a kernel of a layer's mlp changed."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x.at[layer].set(change(x[layer])) if f"['{name}']" in jax.tree_util.keystr(path) else x, fresh()
    )


# --- without a model --------------------------------------------------------------------------------------------------


def line(params, rows, key):
    del key
    return {"loss": (params["slope"][0] * rows["weights"].sum() + params["slope"][1], rows["weights"].sum())}


SLOPES = {"slope": jnp.ones(2)}


def test_a_batch_a_parameter_and_a_moment():
    rows = batch()
    rows["weights"][1, 2] = np.nan
    assert first(SLOPES, line, rows)[0] == "batch weights: 1 of 32 numbers are not finite, the first at [1, 2]: nan"
    named, _ = first({"slope": jnp.array([1.0, -jnp.inf])}, line)
    assert named == "parameter slope: 1 of 2 numbers are not finite, the first at [1]: -inf"
    moments = jax.tree.map(lambda x: x / 0 if x.ndim else x, OPTIMIZER.init(SLOPES))
    named, said = first(SLOPES, line, moments=moments)
    assert named.startswith("moment 0/mu/slope: 2 of 2 numbers") and "modules and losses: finite" in said


def test_a_loss_a_gradients_norm_and_an_update():
    def times(factor):
        return lambda *arguments: {"loss": (line(*arguments)["loss"][0] * factor, jnp.ones(()))}

    assert first(SLOPES, times(1e38))[0].startswith("loss: the sum of the batch is inf")
    # 32 x 1e30, whose square is more than float32 holds.
    named, said = first(SLOPES, times(1e30))
    assert named == "the norm of the gradient overflows float32; slope has its largest number" and "loss" in said
    broken = optax.stateless(lambda updates, _: jax.tree.map(lambda x: x / 0, updates))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "OPTIMIZER", broken)
        assert first(SLOPES, line)[0].startswith("update slope: 2 of 2 numbers are not finite")
    named, said = first(SLOPES, line)
    assert named is None and "gradient: finite, its norm is 1.0" in said  # 32 / 32, and 2 / 32 of two micro-batches


# --- of a model -------------------------------------------------------------------------------------------------------


def test_a_parameter_and_the_layer_that_meets_it():
    params = changed("down", lambda x: x.at[3, 5].set(jnp.inf), 1)
    named, said = first(params, LOSS)
    size = params["stack"]["layers"]["mlp"]["down"]["kernel"].size
    name = "parameter stack/layers/mlp/down/kernel"
    assert named == f"{name}: 1 of {size:,} numbers are not finite, the first at [1, 3, 5]: inf"
    assert "what module stack/layers/mlp/down in layer 1 gives" in said


def test_a_layer_that_overflows():
    """Both kernels are finite, and their product of 1e60 is not."""
    params = changed("up", lambda x: x * 1e30, 1)
    down = params["stack"]["layers"]["mlp"]["down"]
    down["kernel"] = down["kernel"].at[1].multiply(1e30)
    named, said = first(params, LOSS)
    assert named.startswith("what module stack/layers/mlp/down in layer 1 gives: "), named
    assert "parameter: finite" in said and float(said.rsplit(" ", 1)[1]) > 1e27


def test_the_gradient_that_the_backward_pass_comes_to_first():
    """The slope of a root at 0 is infinite: three of them, and the last layer's comes before the first's."""

    def rooted(params, rows, key):
        mlp = params["stack"]["layers"]["mlp"]
        zeros = [x.sum() * 0 for x in (params["embed"]["table"], mlp["up"]["kernel"][0], mlp["down"]["kernel"][2])]
        total, weight = LOSS(params, rows, key)["loss"]
        return {"loss": (total + sum(map(jnp.sqrt, zeros)), weight)}

    named, said = first(fresh(), rooted)
    assert "modules and losses: finite" in said
    size = fresh()["stack"]["layers"]["mlp"]["down"]["kernel"].size
    name = "gradient stack/layers/mlp/down/kernel in layer 2"
    assert named == f"{name}: {size // LAYERS:,} of {size:,} numbers are not finite"


def test_a_sound_step_has_none():
    named, said = first(fresh(), LOSS)
    assert named is None and "gradient: finite, its norm is" in said


def test_parameters_are_those_of_the_newest_checkpoint_before_the_step():
    assert nearest((12, 8, 4), 11) == 8 and nearest((12, 8), 8) == 8 and nearest((16, 12), 5) == 12
