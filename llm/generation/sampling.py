"""Drawing the next token."""

import math

import jax
import jax.numpy as jnp

from llm.generation.spec import SamplingSpec

_ROUNDING = 1e-6  # of a float32 sum of probabilities: 0.5 + 0.3 may come out below 0.8


def filter_logits(logits_BV: jax.Array, spec: SamplingSpec) -> jax.Array:
    """Logits after temperature, top-k, top-p and min-p, in float32, the largest 0; what is filtered out is -inf.

    Ties are ordered by lower id, so exactly k tokens pass top-k. Top-p keeps a token while the mass of those before it
    is below p, and always the first (nucleus sampling, Holtzman et al. 2020); a mass within 1e-6 of p counts as p.
    Min-p keeps tokens at least min_p times as likely as the first (Nguyen et al. 2024). `spec.temperature` must be
    above 0.
    """
    logits_BV = logits_BV.astype(jnp.float32)
    # From the largest, so that no temperature makes it infinite.
    logits_BV = (logits_BV - logits_BV.max(-1, keepdims=True)) / spec.temperature
    vocab = logits_BV.shape[-1]
    if 0 < spec.top_k < vocab or spec.top_p < 1:
        order_BV = jnp.argsort(-logits_BV, axis=-1, stable=True)
        sorted_BV = jnp.take_along_axis(logits_BV, order_BV, axis=-1)
        keep_BV = jnp.ones(logits_BV.shape, bool)
        if 0 < spec.top_k < vocab:
            keep_BV &= jnp.arange(vocab) < spec.top_k
        if spec.top_p < 1:
            mass_BV = jax.nn.softmax(jnp.where(keep_BV, sorted_BV, -jnp.inf), axis=-1)
            before_BV = jnp.cumsum(mass_BV, axis=-1) - mass_BV
            keep_BV &= (before_BV < spec.top_p - _ROUNDING) | (jnp.arange(vocab) == 0)
        rows = jnp.arange(logits_BV.shape[0])[:, None]
        kept_BV = jnp.where(keep_BV, sorted_BV, -jnp.inf)
        logits_BV = jnp.full_like(logits_BV, -jnp.inf).at[rows, order_BV].set(kept_BV)
    if spec.min_p > 0:
        logits_BV = jnp.where(logits_BV >= math.log(spec.min_p), logits_BV, -jnp.inf)
    return logits_BV


def sample(keys_B: jax.Array, logits_BV: jax.Array, spec: SamplingSpec) -> jax.Array:
    """One token a row, int32 of shape (B,), each drawn with its own key; the most likely one at temperature 0."""
    if spec.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys_B, filter_logits(logits_BV, spec)).astype(jnp.int32)


def distribution(logits_BV: jax.Array, spec: SamplingSpec) -> jax.Array:
    """The probabilities by which `sample` draws, float32; at temperature 0 all of it is the most likely token's."""
    if spec.temperature == 0:
        return jax.nn.one_hot(jnp.argmax(logits_BV, axis=-1), logits_BV.shape[-1])
    return jax.nn.softmax(filter_logits(logits_BV, spec), axis=-1)
