"""What the Transformers read off a batch: segments, positions, and the mask of a row with or without its cache."""

import dataclasses

import jax
import jax.numpy as jnp

from llm.attention import Mask
from llm.nn.cache import KVCache


def segments_of(batch: dict, key: str = "tokens") -> jax.Array:
    """batch["segments"], or ones: the whole row is one document."""
    name = key.replace("tokens", "segments")
    return batch[name] if name in batch else jnp.ones(batch[key].shape, jnp.int32)


def positions_of(batch: dict, key: str = "tokens") -> jax.Array:
    """batch["positions"], or 0, 1, ... of what is real: padding may stand on either side of a row."""
    positions, segments = (key.replace("tokens", name) for name in ("positions", "segments"))
    if positions in batch:
        return batch[positions]
    if segments in batch:
        return jnp.maximum(jnp.cumsum(batch[segments] != 0, axis=1, dtype=jnp.int32) - 1, 0)
    return jnp.broadcast_to(jnp.arange(batch[key].shape[1], dtype=jnp.int32), batch[key].shape)


def causal_rows(batch: dict, cache: KVCache | None) -> tuple[jax.Array, Mask, KVCache | None]:
    """(positions_BT, the mask of rows that see no later token, the cache with its lengths advanced).

    With a cache, batch["segments"] says which tokens are real: padding (0), on either side of them, is not counted in
    the row's length, and is not kept. A layer whose keys do not lie in order says where they are.

    Raises:
        ValueError: more tokens than the cache takes at once.
    """
    segments_BT = batch.get("segments")
    if cache is None:
        # Segments stay None where all is one document: an implementation then compares none.
        mask = Mask(
            causal=True,
            q_segments_BT=segments_BT,
            kv_segments_BS=segments_BT,
            prefix_lengths_B=batch.get("prefix_lengths"),
        )
        return positions_of(batch), mask, None
    T = batch["tokens"].shape[1]
    if T > cache.chunk:
        raise ValueError(f"the cache takes {cache.chunk} tokens of a row at once, got {T}: feed them in pieces")
    before_B1 = cache.lengths_B[:, None]
    if segments_BT is None:
        positions_BT, after_B = before_B1 + jnp.arange(T, dtype=jnp.int32), cache.lengths_B + T
    else:
        counted_BT = jnp.cumsum(segments_BT != 0, axis=1, dtype=jnp.int32)
        after_B = cache.lengths_B + counted_BT[:, -1]
        # Padding lies at the row's new length, where nothing is kept.
        positions_BT = jnp.where(segments_BT != 0, before_B1 + counted_BT - 1, after_B[:, None])
    cache = dataclasses.replace(cache, lengths_B=after_B)
    mask = Mask(causal=True, q_positions_BT=positions_BT, kv_lengths_B=cache.lengths_B)
    return positions_BT, mask, cache
