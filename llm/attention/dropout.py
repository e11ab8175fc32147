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


def key_words(key: jax.Array, offset: tuple[int | jax.Array, int | jax.Array] = (0, 0)) -> jax.Array:
    """Four uint32 words: the two of a JAX random key, typed or raw, then `offset`.

    `offset` is the batch row and query head that row 0 and head 0 of the call stand for, when it is part of a larger.
    """
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.key_data(key)
    first, second = key.reshape(-1)[-2:].astype(jnp.uint32)
    return moved(jnp.stack([first, second, jnp.uint32(0), jnp.uint32(0)]), *offset)


def moved(words: jax.Array, rows: int | jax.Array, heads: int | jax.Array) -> jax.Array:
    """The words of a call on the part of a larger one that starts at this row and query head."""
    return words + jnp.stack([jnp.asarray(x).astype(jnp.uint32) for x in (0, 0, rows, heads)])


def bits(words, batch, head, q_position, kv_position_div_4) -> tuple[jax.Array, ...]:
    """The four words of each counter, of key positions 4 kv_position_div_4 .. + 3; the index arrays broadcast."""
    counter = (batch + words[2], head + words[3], q_position, kv_position_div_4)
    counter = tuple(x.astype(jnp.uint32) for x in jnp.broadcast_arrays(*counter))
    return philox_4x32(counter, (words[0], words[1]))


def survives(word: jax.Array, rate: float) -> jax.Array:
    """True where a weight with this random word is kept."""
    return word >= jnp.uint32(round(rate * 2**32))


def keep(
    words: jax.Array, rate: float, batch: jax.Array, head: jax.Array, q_position: jax.Array, kv_position: jax.Array
) -> jax.Array:
    """True where a weight survives dropout; the four index arrays broadcast to the shape of the result.

    Bits are Philox-4x32-10 of the counter (batch row, head, query position, key position // 4) under the key, the
    lane is key position % 4, and the threshold is compared as integers. `words` are those of `key_words`.
    """
    return survives(chosen_word(words, batch, head, q_position, kv_position), rate)


def chosen_word(words, batch, head, q_position, kv_position) -> jax.Array:
    """The random word of each weight; arguments as for `keep`."""
    # Shifts and masks: they floor like // and % do, and every compiler of kernels has them.
    a, b, c, d = bits(words, batch, head, q_position, kv_position >> 2)
    lane = kv_position & 3
    return jnp.where(lane < 2, jnp.where(lane == 0, a, b), jnp.where(lane == 2, c, d))


def keep_run(
    words: jax.Array,
    rate: float,
    batch: jax.Array,
    head: jax.Array,
    q_position: jax.Array,
    first: int | jax.Array,
    count: int,
    axis: int,
) -> jax.Array:
    """`keep` for the key positions first .. first + count - 1, `first` a multiple of 4, on `axis`.

    The three index arrays have size 1 there. A quarter of the work of `keep`: every counter serves its four lanes.
    """
    shape = [1] * q_position.ndim
    axis %= len(shape)
    shape[axis] = groups = -(-count // 4)
    four = bits(words, batch, head, q_position, first // 4 + jnp.arange(groups).reshape(shape))
    # Without the barrier XLA would compute the counters once more for every lane.
    lanes = jax.lax.optimization_barrier(tuple(survives(x, rate) for x in four))
    kept = jnp.stack(lanes, axis + 1)
    kept = kept.reshape(*kept.shape[:axis], 4 * groups, *kept.shape[axis + 2 :])
    return jax.lax.slice_in_dim(kept, 0, count, axis=axis)
