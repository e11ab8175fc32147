"""Stretched rotary positions against float64 oracles written from the papers and the models' published definitions."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from llm.models import PRESETS
from llm.nn.position import SCALINGS, Rope, rotary

# --- the oracles: a pair at a time ------------------------------------------------------------------------------------


def plain(base, width, pair):
    return 1.0 / base ** (2 * pair / width)


def linear(base, width, pair, factor):
    """Chen et al. 2023: position m stands where m / factor did."""
    return plain(base, width, pair) / factor


def ntk(base, width, pair, factor):
    """Another base, by which the slowest pair is stretched by the factor and the fastest not at all."""
    return plain(base * factor ** (width / (width - 2)), width, pair)


def llama3(base, width, pair, factor, context, low, high):
    """By wavelength, as Llama 3.1's reference says it."""
    frequency = plain(base, width, pair)
    wavelength = 2 * math.pi / frequency
    if wavelength < context / high:
        return frequency
    if wavelength > context / low:
        return frequency / factor
    smooth = (context / wavelength - low) / (high - low)
    return (1 - smooth) * frequency / factor + smooth * frequency


def yarn(base, width, pair, factor, context, fast=32, slow=1):
    """Peng et al. 2023 as released: the ramp runs over the pair's index, between rounded borders."""

    def border(turns):
        return width * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(base))

    first, last = max(math.floor(border(fast)), 0), min(math.ceil(border(slow)), width - 1)
    ramp = min(max((pair - first) / (last - first if last > first else 0.001), 0), 1)
    frequency = plain(base, width, pair)
    return frequency * (1 - ramp) + frequency / factor * ramp


CASES = {
    "plain": (Rope(), 8, plain, ()),
    "plain, another base": (Rope(5e5), 128, plain, ()),
    "factor without scaling": (Rope(factor=4.0), 8, plain, ()),
    "linear": (Rope(scaling="linear", factor=4.0), 128, linear, (4,)),
    "ntk": (Rope(scaling="ntk", factor=8.0), 64, ntk, (8,)),
    "llama 3.1": (Rope(5e5, "llama3", 8.0), 128, llama3, (8, 8192, 1, 4)),
    "llama 3.2": (Rope(5e5, "llama3", 32.0), 64, llama3, (32, 8192, 1, 4)),
    "llama3, other borders": (Rope(1e4, "llama3", 3.0, 500, 2.0, 7.0), 32, llama3, (3, 500, 2, 7)),
    "yarn, Qwen 2.5": (Rope(1e6, "yarn", 4.0, 32768), 128, yarn, (4, 32768)),
    "yarn, DeepSeek": (Rope(1e4, "yarn", 40.0, 4096), 64, yarn, (40, 4096)),
    "yarn, other turns": (Rope(1e4, "yarn", 16.0, 2048, fast_turns=20.0, slow_turns=2.0), 32, yarn, (16, 2048, 20, 2)),
    "yarn, one pair": (Rope(1e4, "yarn", 2.0, 4), 4, yarn, (2, 4)),
}


@pytest.mark.parametrize("name", CASES)
def test_frequencies(name):
    rope, width, oracle, how = CASES[name]
    want = [oracle(rope.base, width, pair, *how) for pair in range(width // 2)]
    np.testing.assert_allclose(rope.frequencies(width), want, rtol=1e-12)


def test_every_scaling_is_covered():
    assert {rope.scaling for rope, *_ in CASES.values()} == {"", *SCALINGS}


# --- values known from elsewhere --------------------------------------------------------------------------------------


def test_known_borders_and_ends():
    """How much each pair is slowed down."""

    def slower(rope, width):
        return Rope(rope.base).frequencies(width) / rope.frequencies(width)

    # Llama 3.1: 29 pairs turn more than four times in 8,192 places and are kept, the last 29 less than once.
    factors = slower(Rope(5e5, "llama3", 8.0), 128)
    np.testing.assert_allclose(factors[:29], 1)
    np.testing.assert_allclose(factors[35:], 8)
    assert (np.diff(factors[28:36]) > 0).all()
    # DeepSeek-V2's ramp goes from pair 10 to pair 23.
    factors = slower(Rope(1e4, "yarn", 40.0, 4096), 64)
    np.testing.assert_allclose(factors[:11], 1)
    np.testing.assert_allclose(factors[23:], 40)
    assert (np.diff(factors[10:24]) > 0).all()
    # The base of "ntk": the fastest pair stays, the slowest is stretched by the factor.
    factors = slower(Rope(1e4, "ntk", 8.0), 128)
    np.testing.assert_allclose(factors[[0, -1]], [1, 8], rtol=1e-12)
    assert (np.diff(factors) > 0).all()


@pytest.mark.parametrize("factor, value", [(4.0, 1.1386294361), (16.0, 1.2772588722), (1.0, 1.0)])
def test_yarn_sharpens_the_scores_and_no_other_does(factor, value):
    """Queries and keys are lengthened by 0.1 ln(factor) + 1 each; Qwen 2.5's is 1.1386."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 3, 8)), jnp.float32)
    positions = jnp.array([[0, 1500]])
    for scaling in ("", *SCALINGS):
        longer = jnp.linalg.norm(rotary(x, positions, Rope(scaling=scaling, factor=factor)), axis=-1)
        want = value if scaling == "yarn" else 1.0
        np.testing.assert_allclose(longer / jnp.linalg.norm(x, axis=-1), want, rtol=1e-6)


@pytest.mark.parametrize("scaling", ["", *SCALINGS])
def test_rotation_is_by_these_frequencies(scaling):
    """Feature i with feature i + H / 2, at far positions too (CASES: C10); float64 is the truth."""
    rope = Rope(1e4, scaling, 4.0, 256)
    x = np.random.default_rng(0).normal(size=(2, 3, 2, 8)).astype(np.float32)
    positions = np.array([[0, 1, 2], [100, 1000, 1001]])
    got = rotary(jnp.asarray(x), jnp.asarray(positions), rope)
    how = {"": (), "linear": (4,), "ntk": (4,), "llama3": (4, 256, 1, 4), "yarn": (4, 256)}[scaling]
    oracle = {"": plain, "linear": linear, "ntk": ntk, "llama3": llama3, "yarn": yarn}[scaling]
    long = 0.1 * math.log(4) + 1 if scaling == "yarn" else 1
    for pair in range(4):
        angle = positions[:, :, None] * oracle(1e4, 8, pair, *how)
        turned = (x[..., pair] + 1j * x[..., pair + 4]) * np.exp(1j * angle) * long
        np.testing.assert_allclose(got[..., pair], turned.real, atol=3e-4)
        np.testing.assert_allclose(got[..., pair + 4], turned.imag, atol=3e-4)


def test_the_preset_of_llama_3_2_is_stretched():
    spec = PRESETS["gpt"]["llama-3.2-1b"]
    rope = spec.attention_settings().rope
    assert rope == Rope(5e5, "llama3", 32.0, 8192, 1.0, 4.0)
