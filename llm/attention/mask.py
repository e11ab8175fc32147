"""What a query may see. One pytree, understood whole by every implementation."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=(
        "q_segments_BT",
        "kv_segments_BS",
        "q_positions_BT",
        "kv_positions_BS",
        "kv_lengths_B",
        "prefix_lengths_B",
        "dense_BNTS",
    ),
    meta_fields=("causal", "window"),
)
@dataclasses.dataclass(frozen=True)
class Mask:
    """The visibility rule of one attention call.

    A key is visible to a query when it has the query's segment, its position is below the row's length, it lies
    within the window, and the call is not causal, or the key's position is not after the query's, or the key lies
    in the prefix. A query that sees nothing gives exactly zero and passes zero gradient.

    Attributes:
        causal: a key after the query is hidden.
        window: (left, right), the largest distance a key may lie before and after the query; None is unlimited.
        q_segments_BT, kv_segments_BS: integer document ids of packed rows, given together. 0 is padding: it sees
            nothing and is seen by nothing.
        q_positions_BT, kv_positions_BS: integer positions. Keys default to 0..S-1 and queries to S-T..S-1, so that
            the last query lines up with the last key. Caches and sequence shards pass theirs. Dropout draws its bits
            by position, so documents of one row whose positions restart at 0 share them.
        kv_lengths_B: keys at or beyond this position are hidden (an unfilled cache). Like all that is hidden, they
            must be finite: they are multiplied by a weight of 0.
        prefix_lengths_B: keys before this position are visible in spite of `causal` (prefix language models).
        dense_BNTS: bool, True is visible; B and N may be 1. The only field that takes T x S memory.
    """

    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    q_segments_BT: jax.Array | None = None
    kv_segments_BS: jax.Array | None = None
    q_positions_BT: jax.Array | None = None
    kv_positions_BS: jax.Array | None = None
    kv_lengths_B: jax.Array | None = None
    prefix_lengths_B: jax.Array | None = None
    dense_BNTS: jax.Array | None = None

    def positions(self, queries: int, keys: int, xp: Any = jnp) -> tuple[jax.Array, jax.Array]:
        """Positions of queries and keys, each of shape (B or 1, length), the defaults filled in as arrays of `xp`."""
        q, kv = self.q_positions_BT, self.kv_positions_BS
        if q is None:
            q = xp.arange(keys - queries, keys, dtype=jnp.int32)[None]
        if kv is None:
            kv = xp.arange(keys, dtype=jnp.int32)[None]
        # Distances are differences: an unsigned position would wrap.
        return q.astype(jnp.int32), kv.astype(jnp.int32)

    def check(self, batch: int, heads: int, queries: int, keys: int) -> None:
        """Raises ValueError, naming the shapes, when a field does not fit a call of these sizes."""
        if (self.q_segments_BT is None) != (self.kv_segments_BS is None):
            raise ValueError("Mask: q_segments_BT and kv_segments_BS must be given together")
        if self.window is not None and (
            len(self.window) != 2 or any(side is not None and not 0 <= side < 2**30 for side in self.window)
        ):
            raise ValueError(f"Mask: window={self.window} must be (left, right), each None or from 0 to 2**30 - 1")
        shapes = {
            "q_segments_BT": (batch, queries),
            "kv_segments_BS": (batch, keys),
            "q_positions_BT": (batch, queries),
            "kv_positions_BS": (batch, keys),
            "kv_lengths_B": (batch,),
            "prefix_lengths_B": (batch,),
        }
        for name, shape in shapes.items():
            array = getattr(self, name)
            if array is None:
                continue
            if array.shape != shape:
                raise ValueError(f"Mask: {name} has shape {array.shape}, expected {shape}")
            if not jnp.issubdtype(array.dtype, jnp.integer):
                raise ValueError(f"Mask: {name} has dtype {array.dtype}, expected an integer")
        dense = self.dense_BNTS
        if dense is not None:
            if dense.dtype != jnp.bool_:
                raise ValueError(f"Mask: dense_BNTS has dtype {dense.dtype}, expected bool (True is visible)")
            full = (batch, heads, queries, keys)
            if (
                dense.ndim != 4
                or any(have not in (1, want) for have, want in zip(dense.shape[:2], full[:2]))
                or (dense.shape[2:] != full[2:])
            ):
                raise ValueError(f"Mask: dense_BNTS has shape {dense.shape}, expected {full} (B and N may be 1)")


def visible(
    mask: Mask,
    q_positions_BT: jax.Array,
    kv_positions_BS: jax.Array,
    q_segments_BT: jax.Array | None,
    kv_segments_BS: jax.Array | None,
) -> jax.Array:
    """The rule of `Mask` without its dense part: bool of shape (B or 1, T, S).

    `mask` gives the static fields, lengths and prefixes; positions and segments come apart from it so that a block
    of queries can meet a block of keys.
    """
    q, kv = q_positions_BT[:, :, None], kv_positions_BS[:, None, :]
    per_row = [None if x is None else x[:, None, None] for x in (mask.kv_lengths_B, mask.prefix_lengths_B)]
    segments = None, None
    if q_segments_BT is not None and kv_segments_BS is not None:
        segments = q_segments_BT[:, :, None], kv_segments_BS[:, None, :]
    seen = rule(mask, q, kv, *segments, *per_row)
    everything = jnp.ones((1, q.shape[1], kv.shape[2]), bool)
    return everything if seen is None else everything & seen


def rule(mask: Mask, q, kv, q_segments, kv_segments, length, prefix) -> jax.Array | None:
    """The rule of `Mask` without its dense part on positions, segments, lengths and prefixes that broadcast.

    Elementwise, so that a kernel can apply it to a tile of any layout. None stands for what was not given, and is
    the result where nothing hides anything. Only the static fields of `mask` are read.
    """
    conditions = []
    if mask.causal:
        before = kv <= q
        conditions.append(before if prefix is None else before | (kv < prefix))
    left, right = mask.window or (None, None)
    if left is not None:
        conditions.append(kv >= q - left)
    if right is not None:
        conditions.append(kv <= q + right)
    if length is not None:
        conditions.append(kv < length)
    if q_segments is not None and kv_segments is not None:
        conditions += [q_segments == kv_segments, q_segments != 0]
    return functools.reduce(jnp.logical_and, conditions) if conditions else None
