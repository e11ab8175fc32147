"""What decoding carries from step to step: an explicit argument and result of every model."""

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class KVCache:
    """Keys and values of all layers, and the number of tokens each row has seen, lengths_B.

    A layer with a window of w keys before the query keeps a ring of w + `chunk` places, if the row has more: a token
    is written at its position modulo that number. A call of `chunk` tokens then overwrites no key that its first query
    sees; if it is taken back to that query (`lengths_B` alone), what it has overwritten lies before every window.

    Attributes:
        layers: for each place of the stack's pattern of windows, one where all layers are alike, its layers' k_LBSKH
            and v_LBSKH; of a decoder that attends to a source also the source's.
        lengths_B: int32.
        source_segments_BS: the source's segments, (B, 0) without a source.
        chunk: the most tokens that a call may add to a row.
    """

    layers: tuple[tuple[jax.Array, ...], ...]
    lengths_B: jax.Array
    source_segments_BS: jax.Array
    chunk: int = flax.struct.field(pytree_node=False)

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
        chunk: int | None = None,
        windows: Sequence[int | None] = (None,),
    ) -> "KVCache":
        """A cache for rows of at most `length` tokens, and for a source where its length is given.

        `chunk` is the row's length where it is None. The `windows` are those of the layers in turn; None is all.
        """
        chunk = length if chunk is None else chunk
        source = [] if source_length is None else [source_length] * 2

        def arrays(window: int | None) -> tuple[jax.Array, ...]:
            own = length if window is None else min(length, window + chunk)
            shapes = ((layers // len(windows), batch, n, kv_heads, head_width) for n in (own, own, *source))
            return tuple(jnp.zeros(shape, dtype) for shape in shapes)  # each its own: the decoding loop donates them

        segments = jnp.zeros((batch, source_length or 0), jnp.int32)
        return cls(tuple(map(arrays, windows)), jnp.zeros((batch,), jnp.int32), segments, chunk)


def write(cache_BSKH: jax.Array, new_BTKH: jax.Array, positions_BT: jax.Array, lengths_B: jax.Array) -> jax.Array:
    """Writes each row's new entries at their positions modulo S; what lies beyond its length, padding, is dropped."""
    rows, S = jnp.arange(cache_BSKH.shape[0])[:, None], cache_BSKH.shape[1]
    places_BT = jnp.where(positions_BT < lengths_B[:, None], positions_BT % S, S)
    return cache_BSKH.at[rows, places_BT].set(new_BTKH.astype(cache_BSKH.dtype), mode="drop")


def held_positions(places: int, lengths_B: jax.Array) -> jax.Array:
    """positions_BS of the keys in a ring: the newest below the row's length; a place never written is beyond it."""
    place_S, last_B1 = jnp.arange(places, dtype=jnp.int32), lengths_B[:, None] - 1
    newest_BS = last_B1 - (last_B1 - place_S) % places
    return jnp.where(newest_BS < 0, place_S, newest_BS)
