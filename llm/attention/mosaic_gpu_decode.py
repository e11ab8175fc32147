"""A few queries over a long cache on the forward kernel of `mosaic_gpu` (split-K decoding).

The queries of all heads that share a key head become the rows of one tile, so that keys and values are read once, and
the keys are cut into parts, so that every multiprocessor reads some. Blocks of keys beyond a row's length are not
listed and not read. Source: Dao et al. 2023 (Flash-Decoding). Forward only; the backward passes are the usual ones.
"""

import dataclasses

import jax
import jax.numpy as jnp

from llm.attention import blocks
from llm.attention import mosaic_gpu_tiles as tiles
from llm.attention.bias import BucketBias
from llm.attention.mask import Mask
from llm.attention.mosaic_gpu_tiles import ROWS, Settings

MOST_QUERIES = 8
LEAST_BLOCKS = 4  # of keys in a part


def fits(s: Settings) -> bool:
    """Whether a call is for this path: few queries, which with their group fit in a tile, and no dropout."""
    return s.queries <= MOST_QUERIES and s.queries * s.group <= ROWS and s.rate == 0


def fold(s: Settings, q_BTNH, bias, mask: Mask) -> tuple[Settings, jax.Array, dict, jax.Array, jax.Array]:
    """(settings, q, operands, order, counts) of the forward kernel, whose heads are key heads and rows (G, T)."""
    size = s.decode
    B, T, N, H = q_BTNH.shape
    K = N // s.group
    key_blocks = -(-s.keys // size.k_block)
    splits = max(1, min(2 * s.ctas // (B * K), key_blocks // LEAST_BLOCKS))
    folded = dataclasses.replace(s, heads=K, group=1, fold=T, splits=splits, forward=size)
    q = q_BTNH.reshape(B, T, K, s.group, H).transpose(0, 3, 1, 2, 4).reshape(B, -1, K, H)
    q_positions, _ = mask.positions(T, s.keys)
    by_row = {"q_positions_BT": q_positions, "q_segments_BT": mask.q_segments_BT}
    rows = {name: None if x is None else _rows(jnp.tile(x, s.group), 1, mode="edge") for name, x in by_row.items()}
    whole = tiles.plan(s, T, size.k_block)
    dense = blocks.fold_scores(whole, mask.dense_BNTS)
    added = None if isinstance(bias, BucketBias) else blocks.fold_scores(whole, bias)
    row_mask = dataclasses.replace(mask, dense_BNTS=dense, **rows)
    given = tiles.operands(folded, row_mask, added, None, ROWS, size.k_block, turned=False)
    if isinstance(bias, BucketBias):
        given |= tiles.table(s, bias, mask, T, size.k_block, turned=False)
        table_KGR = given["table"].reshape(K, s.group, -1)
        given["table"] = _rows(jnp.repeat(table_KGR, T, axis=1), 1).swapaxes(1, 2)  # (K, R', 64)
    return folded, _rows(q, 1), given, *tiles.lists(s, mask, T, size.k_block, turned=False)


def unfold(s: Settings, out, lse) -> tuple[jax.Array, jax.Array]:
    """out_BTNH and lse_BTN in float32 from those of the parts, (splits, B, 1, 64, K, H) and (splits, B, K, 1, 64)."""
    lse = lse[:, :, :, 0]
    top = lse.max(0)
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    shares = jnp.exp(lse - top)
    total = shares.sum(0)
    safe = jnp.where(total == 0, 1.0, total)
    out = (jnp.swapaxes(shares, 2, 3)[..., None] * out[:, :, 0]).sum(0) / jnp.swapaxes(safe, 1, 2)[..., None]
    lse = jnp.where(total == 0, -jnp.inf, top + jnp.log(safe))
    B, T, G = s.batch, s.queries, s.group
    out = out[:, : G * T].reshape(B, G, T, -1, s.width).transpose(0, 2, 3, 1, 4)  # (B, T, K, G, H)
    lse = lse[..., : G * T].reshape(B, -1, G, T).transpose(0, 3, 1, 2)
    return out.reshape(B, T, -1, s.width), lse.reshape(B, T, -1)


def _rows(x: jax.Array, axis: int, **how) -> jax.Array:
    """An axis of (G, T) padded to the rows of a tile."""
    return blocks.pad(x, axis, ROWS, **how)
