"""Published sizes: parameters counted from shapes alone, against public checkpoints and the papers' figures."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from llm import models
from llm.models import PRESETS
from llm.nn.mlp import ACTIVATIONS
from llm.training.losses import OBJECTIVES
from llm.training.state import count_parameters


def whole(module, batch):
    """The hidden states and the unembedding."""
    return OBJECTIVES["causal"].touch(module, batch)


def pooled(module, batch):
    """BERT's encoder and pooler, without heads."""
    return module.pooler(module(batch).hidden_BTD[:, 0])


# Numbers of the public checkpoints; their unembeddings are tied where they have one table.
EXACT = {
    "gpt": {
        "gpt2": 124_439_808,
        "gpt2-medium": 354_823_168,
        "gpt2-large": 774_030_080,
        "gpt2-xl": 1_557_611_200,
        "llama-2-7b": 6_738_415_616,
        "llama-3-8b": 8_030_261_248,
        "llama-3.2-1b": 1_235_814_400,
        "mistral-7b": 7_241_732_096,
        "mixtral-8x7b": 46_702_792_704,
        "qwen2.5-0.5b": 494_032_768,
        "qwen3-0.6b": 596_049_920,
        "smollm2-135m": 134_515_008,
    },
    "bert": {
        "tiny": 4_385_920,
        "mini": 11_170_560,
        "small": 28_763_648,
        "medium": 41_373_184,
        "base": 109_482_240,
        "large": 335_141_888,
    },
    "t5": {
        "small": 60_506_624,
        "base": 222_903_552,
        "large": 737_668_096,
        "3b": 2_851_598_336,
        "11b": 11_307_321_344,
        "v1.1-small": 76_961_152,
        "v1.1-base": 247_577_856,
        "v1.1-large": 783_150_080,
        "v1.1-xl": 2_849_757_184,
        "v1.1-xxl": 11_135_332_352,
    },
}
# The papers' rounded figures, which hold within 4 %.
ROUNDED = {
    "gpt": {
        "gpt3-small": 125e6,
        "gpt3-medium": 350e6,
        "gpt3-large": 760e6,
        "gpt3-xl": 1.3e9,
        "gpt3-2.7b": 2.7e9,
        "gpt3-6.7b": 6.7e9,
        "gpt3-13b": 13e9,
        "gpt3-175b": 175e9,
    },
    "encdec": {"base": 65e6, "big": 213e6},
}
# Counted by hand. Zaremba's LSTMs have two tables of 10,000, and in a layer two matrices and two biases.


def two_stacks(width: int, ff_width: int) -> int:
    """A layer of an encoder and one of a decoder, with biases everywhere and norms behind each part."""
    attention, norm = 4 * (width * width + width), 2 * width
    mlp = 2 * width * ff_width + ff_width + width
    return (attention + mlp + 2 * norm) + (2 * attention + mlp + 3 * norm)


BY_HAND = {
    "rnn": {
        "zaremba-medium": 2 * 10_000 * 650 + 2 * (2 * 650 * 4 * 650 + 2 * 4 * 650),
        "zaremba-large": 2 * 10_000 * 1500 + 2 * (2 * 1500 * 4 * 1500 + 2 * 4 * 1500),
    },
    # a table of 1,000 tokens, one of 100 places, a map to 10 classes
    "classifier": {"worked-program": (1000 + 100) * 512 + 512 * 10 + 10 + 2 * two_stacks(512, 2048)},
    "encdec": {
        "base": 37_000 * 512 + 6 * two_stacks(512, 2048),
        "big": 37_000 * 1024 + 6 * two_stacks(1024, 4096),
    },
}


@functools.cache
def size(spec, touch=whole) -> int:
    model = models.build(spec)
    ones = jnp.ones((1, 1), jnp.int32)
    batch = {key: ones for key in ("tokens", "segments", "source_tokens", "source_segments")}
    made = jax.eval_shape(lambda: model.init(jax.random.key(0), method=lambda module: touch(module, batch)))
    return count_parameters(made["params"])


def everything_of(family: str):
    if family == "bert":
        return pooled
    return OBJECTIVES["classification"].touch if family == "classifier" else whole


@pytest.mark.parametrize("family", PRESETS)
def test_every_preset_has_its_published_size(family):
    exact = EXACT.get(family, {}) | BY_HAND.get(family, {})
    rounded = ROUNDED.get(family, {})
    assert {*exact, *rounded} == set(PRESETS[family])
    found = {name: size(spec, everything_of(family)) for name, spec in PRESETS[family].items()}
    assert {name: found[name] for name in exact} == exact
    for name, figure in rounded.items():
        assert abs(found[name] / figure - 1) < 0.04, (name, found[name], figure)


def test_bert_base_with_both_pretraining_heads():
    assert size(PRESETS["bert"]["base"], OBJECTIVES["masked"].touch) == 110_106_428


def test_gpt3_xl_is_not_what_the_table_prints():
    printed = dataclasses.replace(PRESETS["gpt"]["gpt3-xl"], heads=24)
    assert abs(size(printed) / 1.3e9 - 1) > 0.1


# Brown et al. 2020, table 2.1: layers, width, heads, head width.
TABLE_2_1 = {
    "gpt3-small": (12, 768, 12, 64),
    "gpt3-medium": (24, 1024, 16, 64),
    "gpt3-large": (24, 1536, 16, 96),
    "gpt3-xl": (24, 2048, 16, 128),  # printed with 24 heads, see above
    "gpt3-2.7b": (32, 2560, 32, 80),
    "gpt3-6.7b": (32, 4096, 32, 128),
    "gpt3-13b": (40, 5140, 40, 128),
    "gpt3-175b": (96, 12288, 96, 128),
}


def test_gpt3_is_table_2_1_and_its_layers_alternate():
    specs = {name: spec for name, spec in PRESETS["gpt"].items() if name.startswith("gpt3")}
    assert {n: (s.layers, s.width, s.heads, s.head_width) for n, s in specs.items()} == TABLE_2_1
    assert {(s.windows, s.context, s.position) for s in specs.values()} == {((0, 256), 2048, "learned")}
    mistral = PRESETS["gpt"]["mistral-7b"]
    # Its window of 4,096 counts the query's own place.
    assert (mistral.windows, mistral.kv_heads, mistral.head_width) == ((4095,), 8, None)


def test_published_activations_epsilons_and_norms():
    """What is another on each side and loads quietly (CASES: C13)."""
    for family, specs in PRESETS.items():
        for name, spec in specs.items():
            if family == "bert":
                assert (spec.activation, spec.norm_epsilon, spec.context, spec.pooling) == ("gelu", 1e-12, 512, "first")
            elif name.startswith(("gpt2", "gpt3")):
                assert (spec.activation, spec.norm, spec.norm_epsilon, spec.bias) == ("gelu_tanh", "layer", 1e-5, True)
            elif family == "gpt":
                qwen = name.startswith("qwen")
                assert (spec.activation, spec.gated, spec.norm) == ("silu", True, "rms")
                assert (spec.norm_epsilon, spec.bias) == (1e-6 if qwen else 1e-5, False)
            elif family == "t5":
                new = name.startswith("v1.1")
                assert (spec.gated, spec.activation, spec.tied) == (new, "gelu_tanh" if new else "relu", not new)
                block = spec.wiring().block
                assert (block.norm, block.epsilon, block.bias, block.attention.scaled) == ("rms", 1e-6, False, False)
    gap = jax.jit(lambda x: ACTIVATIONS["gelu"](x) - ACTIVATIONS["gelu_tanh"](x))(jnp.float32([1.0, 2.70]))
    assert abs(abs(float(gap[0])) - (0.841345 - 0.841192)) < 1e-6 and abs(abs(float(gap[1])) - 4.73e-4) < 1e-6
