"""A few queries over a long cache on the forward kernel of `mosaic_gpu` (split-K decoding).

Query heads are folded into the rows of one tile, and the keys are cut into parts, so that every multiprocessor reads
some. Blocks of keys beyond a row's length are not listed and not read. Source: Dao et al. 2023 (Flash-Decoding).
Forward only; the backward passes are the usual ones.
"""

import dataclasses

import jax
import jax.numpy as jnp

from llm.attention import blocks
from llm.attention import fold as folding
from llm.attention import mosaic_gpu_tiles as tiles
from llm.attention.bias import BucketBias
from llm.attention.mask import Mask
from llm.attention.merge import merge_stacked
from llm.attention.mosaic_gpu_tiles import ROWS, Settings

LEAST_BLOCKS = 4  # of keys in a part


def fits(s: Settings) -> bool:
    """Whether a call is for this path: few queries, which with their group fit in a tile, and no dropout."""
    return s.queries <= folding.DECODE_QUERIES and s.queries * s.group <= ROWS and s.rate == 0


def fold(s: Settings, q_BTNH, bias, mask: Mask) -> tuple[Settings, jax.Array, dict, jax.Array, jax.Array]:
    """(settings, q, operands, order, counts) of the forward kernel, whose heads are key heads and rows (G, T)."""
    size, T, K = s.decode, s.queries, s.heads // s.group
    key_blocks = -(-s.keys // size.k_block)
    splits = max(1, min(2 * s.ctas // (s.batch * K), key_blocks // LEAST_BLOCKS))
    folded = dataclasses.replace(s, heads=K, group=1, fold=T, splits=splits, forward=size)
    array = None if isinstance(bias, BucketBias) else bias
    q, array, rows = folding.fold(tiles.plan(s, T, size.k_block), q_BTNH, array, mask)
    by_row = {name: getattr(rows, name) for name in ("q_positions_BT", "q_segments_BT")}
    padded = {name: _rows(x, mode="edge") for name, x in by_row.items() if x is not None}
    rows = dataclasses.replace(rows, **padded)
    given = tiles.operands(folded, rows, array, None, ROWS, size.k_block, turned=False)
    if isinstance(bias, BucketBias):
        given |= tiles.table(s, bias, mask, T, size.k_block, turned=False)
        table_KGR = given["table"].reshape(K, s.group, -1)
        given["table"] = _rows(jnp.repeat(table_KGR, T, axis=1)).swapaxes(1, 2)  # (K, R', 64)
    return folded, _rows(q), given, *tiles.lists(s, mask, T, size.k_block, turned=False)


def unfold(s: Settings, out, lse) -> tuple[jax.Array, jax.Array]:
    """out_BTNH and lse_BTN in float32 from those of the parts, (splits, B, 1, 64, K, H) and (splits, B, K, 1, 64)."""
    out, lse = merge_stacked(out[:, :, 0], lse[:, :, :, 0].swapaxes(2, 3))
    used = s.group * s.queries
    return folding.unfold(tiles.plan(s, s.queries, s.decode.k_block), out[:, :used], lse[:, :used])


def _rows(x: jax.Array, **how) -> jax.Array:
    """The second axis, (G, T), padded to the rows of a tile."""
    return blocks.pad(x, 1, ROWS, **how)
