"""What decoding carries from step to step: an explicit argument and result of every model."""

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp

from llm.attention.target import target


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


def write(
    kept: tuple[jax.Array, jax.Array], new: tuple[jax.Array, jax.Array], positions_BT: jax.Array, lengths_B: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Keys and values (B, S, K, H) with each row's new ones, (B, T, K, H), at their positions modulo S.

    Those from the row's length on, padding, are dropped.
    """
    (B, S), T = kept[0].shape[:2], positions_BT.shape[1]
    real_BT = positions_BT < lengths_B[:, None]
    k_BTKH, v_BTKH = (x.astype(old.dtype) for x, old in zip(new, kept))
    if T > 1 or target().platform != "cpu" or jax.sharding.get_abstract_mesh().size > 1:
        rows, places_BT = jnp.arange(B)[:, None], jnp.where(real_BT, positions_BT % S, S)
        at = (rows, places_BT)
        return kept[0].at[at].set(k_BTKH, mode="drop"), kept[1].at[at].set(v_BTKH, mode="drop")
    places_B = positions_BT[:, 0] % S

    def put(old_BSKH, b, x_1KH):
        at = b, places_B[b], 0, 0
        before = jax.lax.dynamic_slice(old_BSKH, at, (1, 1, *old_BSKH.shape[2:]))
        return jax.lax.dynamic_update_slice(old_BSKH, jnp.where(real_BT[b, 0], x_1KH[None], before), at)

    # One token a row, in place: outside a loop, or in one of whose single round it knows, XLA on CPU writes into copies
    # of the whole cache, one for each reader.
    count = (lengths_B >= 0).sum()
    return jax.lax.fori_loop(0, count, lambda b, kv: (put(kv[0], b, k_BTKH[b]), put(kv[1], b, v_BTKH[b])), kept)


def held_positions(places: int, lengths_B: jax.Array) -> jax.Array:
    """positions_BS of the keys in a ring: the newest below the row's length; a place never written is beyond it."""
    place_S, last_B1 = jnp.arange(places, dtype=jnp.int32), lengths_B[:, None] - 1
    newest_BS = last_B1 - (last_B1 - place_S) % places
    return jnp.where(newest_BS < 0, place_S, newest_BS)
