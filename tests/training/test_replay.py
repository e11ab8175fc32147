"""The first tensor of a step that is not finite, by its name: of models that were broken at a known place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm import sharding
from llm.models import build
from llm.models.gpt import GPTSpec
from llm.training import losses, optimizer, replay, state
from llm.training.diagnostics import Saved
from llm.training.spec import OptimizerSpec

LAYERS = 3
MODEL = build(GPTSpec(vocab_size=32, context=16, layers=LAYERS, width=16, heads=4, dropout=0.2, remat=True))
LOSS = losses.next_token(MODEL, 8)


@pytest.fixture(scope="module")
def sound():
    """A sound state, its optimizer and the mesh."""
    mesh = sharding.make_mesh(sharding.MeshSpec())
    made_of = state.Recipe(MODEL, optimizer.build(OptimizerSpec(warmup_steps=0), 10))
    with jax.set_mesh(mesh):
        return state.create(made_of, mesh), made_of.optimizer, mesh


def batch():
    rng = np.random.default_rng(0)
    found = {name: rng.integers(0, 32, (4, 16)).astype(np.int32) for name in ("tokens", "targets")}
    found["segments"] = np.ones((4, 16), np.int32)
    found["weights"] = np.ones((4, 16), np.float32)
    found["positions"] = np.tile(np.arange(16, dtype=np.int32), (4, 1))
    return found


def kernel(params, name, change, layer):
    """The parameters with a kernel of a layer's mlp changed."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x.at[layer].set(change(x[layer])) if name in jax.tree_util.keystr(path) else x, params
    )


def first(sound, params=None, rows=None, loss=LOSS, **changes):
    """(what is named, all that is said)."""
    whole, rule, mesh = sound
    whole = whole.replace(params=whole.params if params is None else params, **changes)
    said = []
    with jax.set_mesh(mesh):
        saved = Saved(1, batch() if rows is None else rows, {}, whole, 0)
        return replay.first_bad(loss, rule, saved, 2, 1.0, mesh, said.append), "\n".join(said)


def test_a_batch_and_a_parameter_and_a_moment(sound):
    rows = batch()
    rows["weights"][1, 2] = np.nan
    params = kernel(sound[0].params, "['down']", lambda x: x.at[3, 5].set(jnp.inf), 1)
    named, said = first(sound, params, rows)
    assert named == "batch weights: 1 of 64 numbers are not finite, the first at [1, 2]: nan"
    named, said = first(sound, params)
    size = params["stack"]["layers"]["mlp"]["down"]["kernel"].size
    expected = (
        f"parameter stack/layers/mlp/down/kernel: 1 of {size:,} numbers are not finite, the first at [1, 3, 5]: inf"
    )
    assert named == expected and "what module stack/layers/mlp/down in layer 1 gives" in said
    moments = jax.tree.map(lambda x: x * jnp.inf if x.ndim == 3 else x, sound[0].opt_state)
    assert first(sound, opt_state=moments)[0].startswith("moment ")


@pytest.mark.parametrize("layer", [0, LAYERS - 1])
def test_a_layer_that_overflows_in_its_forward_pass(sound, layer):
    """Both kernels are finite, and their product of 1e60 is not."""
    params = kernel(sound[0].params, "['up']", lambda x: x * 1e30, layer)
    params = kernel(params, "['down']", lambda x: x * 1e30, layer)
    named, said = first(sound, params)
    assert named.startswith(f"what module stack/layers/mlp/down in layer {layer} gives: "), named
    assert "parameter: finite" in said and float(said.rsplit(" ", 1)[1]) > 1e27


def test_a_gradient_that_overflows_where_the_loss_is_finite(sound):
    """The last layer gives 1e30, whose square the norm after it cannot hold: 1 / inf is 0, and its slope is NaN."""
    params = kernel(sound[0].params, "['down']", lambda x: x * 1e30, LAYERS - 1)
    named, said = first(sound, params)
    assert "modules and losses: finite" in said
    assert named.startswith(f"gradient stack/layers/mlp/down/kernel in layer {LAYERS - 1}: "), named


def test_a_norm_of_the_gradient_and_an_update_that_overflow(sound):
    def steep(params, rows, key):
        total, weight = LOSS(params, rows, key)["loss"]
        return {"loss": (total * 1e20, weight)}

    named, _ = first(sound, loss=steep)
    assert named.startswith("the norm of the gradient overflows float32; ")


def test_a_sound_step_has_none(sound):
    named, said = first(sound)
    assert named is None and "gradient: finite, its norm is" in said
