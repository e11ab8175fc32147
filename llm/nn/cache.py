"""The cache of keys and values that decoding carries from step to step: an explicit argument and result."""

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class KVCache:
    """Keys and values of all layers, k_LBSKH and v_LBSKH, and the number of tokens each row has seen, lengths_B."""

    k_LBSKH: jax.Array
    v_LBSKH: jax.Array
    lengths_B: jax.Array

    @classmethod
    def empty(cls, layers: int, batch: int, length: int, kv_heads: int, head_width: int, dtype) -> "KVCache":
        """A cache with room for `length` tokens a row."""
        shape = (layers, batch, length, kv_heads, head_width)
        # Two arrays, not one twice: the decoding loop donates the cache.
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((batch,), jnp.int32))


def write(cache_BSKH: jax.Array, new_BTKH: jax.Array, positions_BT: jax.Array) -> jax.Array:
    """Writes each row's new entries at its own positions; positions beyond the cache are dropped."""
    rows = jnp.arange(cache_BSKH.shape[0])[:, None]
    return cache_BSKH.at[rows, positions_BT].set(new_BTKH.astype(cache_BSKH.dtype), mode="drop")
