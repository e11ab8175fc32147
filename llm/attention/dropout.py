"""Attention dropout from counter-based bits: the same mask on every implementation, block size and sharding."""

import jax
import jax.numpy as jnp

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def _multiply_high(a: jax.Array, b: int) -> jax.Array:
    """The upper 32 bits of a 32 x 32 bit product, from 16-bit halves: no accelerator needs 64-bit integers."""
    a_low, a_high = a & 0xFFFF, a >> 16
    b_low, b_high = jnp.uint32(b & 0xFFFF), jnp.uint32(b >> 16)
    middle = a_high * b_low + ((a_low * b_low) >> 16)
    return a_high * b_high + (middle >> 16) + (((middle & 0xFFFF) + a_low * b_high) >> 16)


def philox_4x32(counter: tuple[jax.Array, ...], key: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
    """Philox-4x32-10: four uint32 words of random bits for each counter of four uint32 words.

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    x0, x1, x2, x3 = counter
    key0, key1 = key
    for _ in range(10):
        high0, low0 = _multiply_high(x0, _MULTIPLIERS[0]), x0 * jnp.uint32(_MULTIPLIERS[0])
        high1, low1 = _multiply_high(x2, _MULTIPLIERS[1]), x2 * jnp.uint32(_MULTIPLIERS[1])
        x0, x1, x2, x3 = high1 ^ x1 ^ key0, low1, high0 ^ x3 ^ key1, low0
        key0, key1 = key0 + jnp.uint32(_WEYL[0]), key1 + jnp.uint32(_WEYL[1])
    return x0, x1, x2, x3


def key_words(key: jax.Array) -> jax.Array:
    """The two uint32 words of a JAX random key, typed or raw."""
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.key_data(key)
    return key.reshape(-1)[-2:].astype(jnp.uint32)


def keep(
    words: jax.Array, rate: float, batch: jax.Array, head: jax.Array, q_position: jax.Array, kv_position: jax.Array
) -> jax.Array:
    """True where a weight survives dropout; the four index arrays broadcast to the shape of the result.

    Bits are Philox-4x32-10 of the counter (batch, head, query position, key position // 4) under `words`, the lane
    is key position % 4, and the threshold is compared as integers.
    """
    lane = kv_position % 4
    counter = tuple(
        jnp.asarray(x).astype(jnp.uint32) for x in jnp.broadcast_arrays(batch, head, q_position, kv_position // 4)
    )
    bits = philox_4x32(counter, (words[0], words[1]))
    chosen = jnp.select([lane == i for i in range(4)], list(bits))
    return chosen >= jnp.uint32(round(rate * 2**32))
