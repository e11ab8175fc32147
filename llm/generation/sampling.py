"""Drawing the next token."""

import jax
import jax.numpy as jnp

from llm.generation.spec import SamplingSpec


def filter_logits(logits_BV: jax.Array, spec: SamplingSpec) -> jax.Array:
    """Logits after temperature, top-k and top-p, in float32; what is filtered out is -inf.

    Ties are ordered by lower id, so exactly k tokens pass top-k. Top-p keeps a token while the mass of those before it
    is below p, and always the first (nucleus sampling, Holtzman et al. 2020). `spec.temperature` must be above 0.
    """
    logits_BV = logits_BV.astype(jnp.float32) / spec.temperature
    vocab = logits_BV.shape[-1]
    if not 0 < spec.top_k < vocab and spec.top_p >= 1:
        return logits_BV
    order_BV = jnp.argsort(-logits_BV, axis=-1, stable=True)
    sorted_BV = jnp.take_along_axis(logits_BV, order_BV, axis=-1)
    keep_BV = jnp.ones(logits_BV.shape, bool)
    if 0 < spec.top_k < vocab:
        keep_BV &= jnp.arange(vocab) < spec.top_k
    if spec.top_p < 1:
        mass_BV = jax.nn.softmax(jnp.where(keep_BV, sorted_BV, -jnp.inf), axis=-1)
        before_BV = jnp.cumsum(mass_BV, axis=-1) - mass_BV
        keep_BV &= (before_BV < spec.top_p) | (jnp.arange(vocab) == 0)
    rows = jnp.arange(logits_BV.shape[0])[:, None]
    return jnp.full_like(logits_BV, -jnp.inf).at[rows, order_BV].set(jnp.where(keep_BV, sorted_BV, -jnp.inf))


def sample(keys_B: jax.Array, logits_BV: jax.Array, spec: SamplingSpec) -> jax.Array:
    """One token a row, int32 of shape (B,), each drawn with its own key; the most likely one at temperature 0."""
    if spec.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys_B, filter_logits(logits_BV, spec)).astype(jnp.int32)
