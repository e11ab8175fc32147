"""Sampling at its corners, against a float64 oracle."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm.errors import InputError
from llm.generation import GenerationSpec, SamplingSpec, filter_logits, sample
from llm.generation.sampling import distribution
from tests.helpers import ROOT, environment


def kept(probabilities, **how):
    logits = jnp.log(jnp.asarray([probabilities], jnp.float32))
    return set(np.flatnonzero(np.isfinite(filter_logits(logits, SamplingSpec(**how))[0])).tolist())


def test_top_p():
    a, b = [0.5, 0.3, 0.1, 0.1], [0.5, 0.3, 0.15, 0.05]
    assert kept(a, top_p=0.8) == kept(b, top_p=0.8) == {0, 1}  # though 0.5 + 0.3 is not 0.8 in float32
    assert kept(a, top_p=0.79) == {0, 1} and kept(a, top_p=0.81) == {0, 1, 2}
    assert kept(a, top_p=0.6) == kept(b, top_p=0.6) == {0, 1}
    assert kept(a, top_p=0.0) == {0}
    assert kept(a, top_p=1.0) == {0, 1, 2, 3}


def test_top_k():
    assert kept([0.2] * 5, top_k=2) == {0, 1}  # ties go to the lower ids
    assert kept([0.1, 0.2, 0.7], top_k=1) == {2}
    assert kept([0.2] * 5, top_k=0) == kept([0.2] * 5, top_k=9) == set(range(5))


def test_min_p():
    assert kept([0.5, 0.3, 0.15, 0.05], min_p=0.29) == {0, 1, 2}
    assert kept([0.5, 0.3, 0.15, 0.05], min_p=0.31) == {0, 1}
    assert kept([0.5, 0.3, 0.15, 0.05], min_p=1.0) == {0} and kept([0.25] * 4, min_p=1.0) == {0, 1, 2, 3}
    assert kept([0.5, 0.3, 0.15, 0.05], min_p=0.31, temperature=2.0) == {0, 1, 2, 3}  # after the temperature


def oracle(logits, temperature, top_k, top_p):
    scaled = np.asarray(logits, np.float64) / temperature
    order = sorted(range(len(scaled)), key=lambda i: (-scaled[i], i))
    if 0 < top_k < len(order):
        order = order[:top_k]
    p = np.exp(scaled[order] - scaled[order[0]])
    before = np.cumsum(p / p.sum()) - p / p.sum()
    order = [i for i, mass in zip(order, before) if mass < top_p or i == order[0]]
    result = np.zeros(len(scaled))
    p = np.exp(scaled[order] - scaled[order[0]])
    result[order] = p / p.sum()
    return result


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "temperature, top_k, top_p", [(1, 0, 1), (0.7, 5, 1), (1.3, 0, 0.6), (0.5, 7, 0.8), (2, 3, 0.3)]
)
def test_filters_against_an_oracle(dtype, temperature, top_k, top_p):
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(20, 30)) * 2, dtype)
    filtered = filter_logits(logits, SamplingSpec(temperature, top_k, top_p))
    assert filtered.dtype == jnp.float32
    for row, got in zip(np.float64(logits), jax.nn.softmax(filtered)):
        np.testing.assert_allclose(got, oracle(row, temperature, top_k, top_p), atol=1e-5)


def test_greedy_is_argmax_for_any_key_and_tiny_temperatures_are_finite():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(4, 9)), jnp.float32)
    for seed in range(3):
        keys = jax.random.split(jax.random.key(seed), 4)
        np.testing.assert_array_equal(sample(keys, logits, SamplingSpec(0.0)), logits.argmax(-1))
        for temperature in (1e-4, 1e-30):
            np.testing.assert_array_equal(sample(keys, logits, SamplingSpec(temperature)), logits.argmax(-1))
    assert np.isfinite(distribution(logits, SamplingSpec(1e-30))).all()


def test_draws_follow_the_distribution_and_never_take_what_is_impossible():
    p = np.array([0.4, 0.3, 0.2, 0.1, 0.0])
    draws = 100_000
    logits = jnp.log(jnp.asarray(p, jnp.float32))[None].repeat(draws, 0)
    drawn = np.asarray(sample(jax.random.split(jax.random.key(0), draws), logits, SamplingSpec(1.0)))
    counts = np.bincount(drawn, minlength=5)
    assert counts[4] == 0
    chi_square = ((counts[:4] - draws * p[:4]) ** 2 / (draws * p[:4])).sum()
    assert chi_square < 16.3  # 0.1% of three degrees of freedom


ON_EIGHT_DEVICES = """
import jax, numpy as np
from llm.generation import SamplingSpec, sample
logits = jax.numpy.asarray(np.random.default_rng(0).normal(size=(16, 40)), "float32")
keys, draw = jax.random.split(jax.random.key(3), 16), jax.jit(sample, static_argnums=2)
rows = jax.sharding.NamedSharding(jax.sharding.Mesh(jax.devices(), "data"), jax.sharding.PartitionSpec("data"))
for spec in (SamplingSpec(1.0), SamplingSpec(0.8, 9, 0.9, 0.02)):
    apart = draw(*jax.device_put((keys, logits), rows), spec)
    assert len(apart.sharding.device_set) == 8
    np.testing.assert_array_equal(draw(keys, logits, spec), apart)
"""


def test_the_same_keys_give_the_same_tokens_on_one_and_eight_devices():
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    run = subprocess.run([sys.executable, "-c", ON_EIGHT_DEVICES], cwd=ROOT, env=environment(**flags),
                         capture_output=True, text=True, timeout=300)  # fmt: skip
    assert run.returncode == 0, run.stderr


def test_what_a_run_bans_has_a_bias_that_is_never_drawn():
    assert GenerationSpec(banned=(1, 7)).sampling().logit_bias == ((1, -np.inf), (7, -np.inf))
    assert GenerationSpec().sampling().logit_bias == ()


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": 1e-40},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_p": 1.1},
        {"top_p": -0.1},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"repetition_penalty": 0.0},
        {"presence_penalty": float("nan")},
        {"frequency_penalty": float("inf")},
        {"no_repeat_ngram": -1},
        {"min_tokens": -1},
        {"logit_bias": ((3, float("nan")),)},
        {"logit_bias": ((-3, 1.0),)},
        {"logit_bias": ((3, 1.0), (3, 2.0))},
    ],
)
def test_wrong_values_are_refused(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        SamplingSpec(**wrong)
