"""What is the GPT family's own: its parameters counted by hand, its layout, and refusals.

Causality, packing, dropout, the cache and the like are columns of `tests/conformance/families.py`.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from llm import models
from llm.errors import InputError
from llm.models.gpt import GPTSpec
from llm.training.state import count_parameters

TINY = GPTSpec(vocab_size=31, context=24, layers=2, width=16, heads=4, kv_heads=2, ff_width=24)
LLAMA = dataclasses.replace(TINY, activation="silu", gated=True, tied=False, qk_norm=True, windows=(5,))
GPT2 = dataclasses.replace(TINY, kv_heads=None, norm="layer", bias=True, position="learned", norm_epsilon=1e-5)
SPECS = {"tiny": TINY, "llama": LLAMA, "gpt2": GPT2}


def _initial(model):
    everything = lambda m: m.unembed(m({"tokens": jnp.zeros((1, 1), jnp.int32)}).hidden_BTD)  # noqa: E731
    return lambda: nn.unbox(model.init(jax.random.key(0), method=everything))["params"]


@functools.cache
def make(spec):
    """A model and its initial parameters."""
    model = models.build(spec)
    return model, jax.jit(_initial(model))()


def shapes(spec):
    return jax.eval_shape(_initial(models.build(spec)))


# Widths of TINY: model, key heads, head, MLP; layers, vocabulary.
D, K, H, F, L, V = 16, 2, 4, 24, 2, 31
GROUPED = 2 * D * D + 2 * D * K * H  # queries and outputs, keys and values


@pytest.mark.parametrize(
    "spec, count",
    [
        (GPT2, V * D + 24 * D + L * (4 * (D * D + D) + (D * F + F) + (F * D + D) + 4 * D) + 2 * D),
        (TINY, V * D + L * (GROUPED + 2 * D * F + 2 * D) + D),
        (
            dataclasses.replace(TINY, gated=True, qk_norm=True, qkv_bias=True, tied=False, windows=(0, 3)),
            2 * V * D + L * (GROUPED + D + 2 * K * H + 2 * H + 3 * D * F + 2 * D) + D,
        ),
        (
            dataclasses.replace(TINY, gated=True, experts=4),
            V * D + L * (GROUPED + 4 * D + 4 * 3 * D * F + 2 * D) + D,
        ),
    ],
    ids=["gpt2", "plain", "everything", "experts"],
)
def test_parameter_count_by_hand(spec, count):
    assert count_parameters(shapes(spec)) == count


def test_every_layer_has_the_leading_axis():
    """One of the layers, or of the rounds of a pattern, whose places have parameters of their own."""
    assert {x.shape[0] for x in jax.tree.leaves(shapes(TINY)["stack"])} == {2}
    layers = shapes(dataclasses.replace(TINY, layers=6, windows=(0, 3)))["stack"]["layers"]
    assert set(layers) == {"block_0", "block_1"}
    assert {x.shape[0] for x in jax.tree.leaves(layers)} == {3}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"heads": 3}, "does not divide model.width=16; set model.head_width"),
        ({"kv_heads": 3}, "model.kv_heads=3 does not divide model.heads=4"),
        ({"layers": 0}, "model.layers=0"),
        ({"dropout": 1.0}, "model.dropout=1.0"),
        ({"activation": "swish"}, "model.activation='swish': there are gelu, gelu_tanh"),
        ({"position": "sinusoid"}, "model.position='sinusoid': there are rope, learned"),
        ({"norm": "batch"}, "model.norm='batch'"),
        ({"attention": "flash"}, "model.attention='flash': there are auto, reference"),
        ({"dtype": "float16"}, "model.dtype='float16'"),
        ({"head_width": 3}, "rotary positions need pairs"),
        ({"rope_scaling": "su"}, "model.rope_scaling='su': there are '', linear"),
        ({"rope_factor": 0.5}, "model.rope_factor=0.5: must be at least 1"),
        ({"rope_low_frequency": 4.0}, "model.rope_low_frequency=4.0 must be above 0 and below"),
        ({"unroll": 3}, "model.unroll=3 does not divide model.layers=2"),
        ({"windows": (0, 3), "unroll": 2}, "does not divide the 1 rounds of model.windows"),
        ({"windows": (0, 3, 5)}, r"model.windows=\(0, 3, 5\): 3 do not divide model.layers=2"),
        ({"windows": (-1,)}, r"model.windows=\(-1,\): must not be negative"),
        ({"experts": 2, "experts_chosen": 3}, "model.experts=2, model.experts_chosen=3"),
        ({"experts": 2, "bias": True}, "model.bias=True: the experts have no biases"),
    ],
)
def test_wrong_settings_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(TINY, **changes)
