"""What decoding carries from step to step: an explicit argument and result of every model."""

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class KVCache:
    """Keys and values of all layers, and the number of tokens each row has seen, lengths_B.

    Attributes:
        layers: k_LBSKH and v_LBSKH; of a decoder that attends to a source also the source's.
        lengths_B: int32.
        source_segments_BS: the source's segments, (B, 0) without a source.
    """

    layers: tuple[jax.Array, ...]
    lengths_B: jax.Array
    source_segments_BS: jax.Array

    @classmethod
    def empty(
        cls,
        layers: int,
        batch: int,
        length: int,
        kv_heads: int,
        head_width: int,
        dtype,
        source_length: int | None = None,
    ) -> "KVCache":
        """A cache with room for `length` tokens a row, and for a source's where its length is given."""
        lengths = [length] * 2 + ([] if source_length is None else [source_length] * 2)
        # An array each, not one twice: the decoding loop donates the cache.
        arrays = tuple(jnp.zeros((layers, batch, n, kv_heads, head_width), dtype) for n in lengths)
        segments = jnp.zeros((batch, source_length or 0), jnp.int32)
        return cls(arrays, jnp.zeros((batch,), jnp.int32), segments)


def write(cache_BSKH: jax.Array, new_BTKH: jax.Array, positions_BT: jax.Array) -> jax.Array:
    """Writes each row's new entries at its own positions; positions beyond the cache are dropped."""
    rows = jnp.arange(cache_BSKH.shape[0])[:, None]
    return cache_BSKH.at[rows, positions_BT].set(new_BTKH.astype(cache_BSKH.dtype), mode="drop")
