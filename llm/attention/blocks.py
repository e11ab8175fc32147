"""Blocks of queries and keys: which pairs of them must be computed, and the scores of one pair.

Shared by `blockwise` and `decode`. A call is cut into parts of `rows` batch rows and `heads` key heads, and a part
into blocks of queries and keys; here every array is that of one part.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm.attention import dropout
from llm.attention.bias import BucketBias
from llm.attention.mask import Mask, visible


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static part of a call.

    Attributes:
        batch, queries, keys, key_heads, group: B, T, S, K and G = N // K of the whole call.
        rows, heads: batch rows and key heads of a part.
        q_block, k_block: queries and keys of a block.
        scale, softcap, dropout_rate, precision: as in `attention`.
    """

    batch: int
    queries: int
    keys: int
    key_heads: int
    group: int
    rows: int
    heads: int
    q_block: int
    k_block: int
    scale: float = 1.0
    softcap: float | None = None
    dropout_rate: float = 0.0
    precision: jax.lax.PrecisionLike = None

    @property
    def q_blocks(self) -> int:
        return -(-self.queries // self.q_block)

    @property
    def k_blocks(self) -> int:
        return -(-self.keys // self.k_block)

    def product(self, subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
        """An einsum in the call's precision, summed in float32."""
        return jnp.einsum(subscripts, a, b, precision=self.precision, preferred_element_type=jnp.float32)


def array_module(x) -> Any:
    """numpy for its arrays, else jax.numpy: what is known while tracing is computed at once, whatever the mesh."""
    return np if isinstance(x, np.ndarray) else jnp


def pad(x: jax.Array, axis: int, size: int, **how) -> jax.Array:
    """Pads an axis to a multiple of `size`."""
    short = -x.shape[axis] % size
    return (
        array_module(x).pad(x, [(0, short if i == axis % x.ndim else 0) for i in range(x.ndim)], **how) if short else x
    )


def pad_scores(plan: Plan, x: jax.Array) -> jax.Array:
    """Pads the T and S axes of a (B, N, T, S) array to whole blocks; axes of 1 stay."""
    if x.shape[2] > 1:
        x = pad(x, 2, plan.q_block)
    return pad(x, 3, plan.k_block) if x.shape[3] > 1 else x


def group_heads(x: jax.Array, key_heads: int) -> jax.Array:
    """(B or 1, N or 1, q, k) -> (B or 1, K or 1, G or 1, q, k)."""
    b, n, *rest = x.shape
    return x.reshape(b, 1, 1, *rest) if n == 1 else x.reshape(b, key_heads, n // key_heads, *rest)


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Positions and segments of one part split into blocks, (blocks, rows or 1, block)."""

    mask: Mask
    q_positions: jax.Array
    k_positions: jax.Array
    q_segments: jax.Array | None
    k_segments: jax.Array | None


def geometry(plan: Plan, mask: Mask, known: bool = False) -> Geometry:
    """Splits what a mask says of single queries and keys into blocks.

    If it is to be `known` while tracing, and the mask has no arrays, it is made of numpy arrays, and so is what
    `needed` and `whole` then give.
    """

    def split(x, block, **how):
        return pad(x, 1, block, **how).reshape(x.shape[0], -1, block).transpose(1, 0, 2)

    xp = np if known and not jax.tree.leaves(mask) else jnp
    q_positions, k_positions = mask.positions(plan.queries, plan.keys, xp)
    q_segments = k_segments = None
    if mask.q_segments_BT is not None and mask.kv_segments_BS is not None:
        q_segments, k_segments = split(mask.q_segments_BT, plan.q_block), split(mask.kv_segments_BS, plan.k_block)
    return Geometry(
        mask,
        split(q_positions, plan.q_block, mode="edge"),
        split(k_positions, plan.k_block, mode="edge"),
        q_segments,
        k_segments,
    )


def needed(plan: Plan, g: Geometry) -> jax.Array:
    """Bool of shape (query blocks, key blocks, rows or 1): where something may be visible.

    A pair is needed when the ranges of its positions and segments could meet: never too few, at times too many.
    """
    q_low, q_high = g.q_positions.min(-1)[:, None], g.q_positions.max(-1)[:, None]
    k_low, k_high = g.k_positions.min(-1)[None], g.k_positions.max(-1)[None]
    result = array_module(g.q_positions).ones((plan.q_blocks, plan.k_blocks, 1), bool)
    if g.mask.causal:
        reach = k_low <= q_high
        if g.mask.prefix_lengths_B is not None:
            reach |= k_low < g.mask.prefix_lengths_B
        result &= reach
    if g.mask.window is not None:
        left, right = g.mask.window
        if left is not None:
            result &= k_high >= q_low - left
        if right is not None:
            result &= k_low <= q_high + right
    if g.mask.kv_lengths_B is not None:
        result &= k_low < g.mask.kv_lengths_B
    if g.q_segments is not None and g.k_segments is not None:
        ceiling = jnp.iinfo(g.q_segments.dtype).max
        q_first = jnp.where(g.q_segments == 0, ceiling, g.q_segments).min(-1)[:, None]
        k_first = jnp.where(g.k_segments == 0, ceiling, g.k_segments).min(-1)[None]
        q_last, k_last = g.q_segments.max(-1)[:, None], g.k_segments.max(-1)[None]
        result &= jnp.maximum(q_first, k_first) <= jnp.minimum(q_last, k_last)
    return result


def whole(plan: Plan, g: Geometry) -> jax.Array:
    """Bool of shape (query blocks, key blocks, rows or 1): where everything is visible, so that no mask is applied.

    Keys beyond the end count as hidden, queries beyond it as their neighbours; a dense mask leaves no pair whole.
    """
    q_low, q_high = g.q_positions.min(-1)[:, None], g.q_positions.max(-1)[:, None]
    k_low, k_high = g.k_positions.min(-1)[None], g.k_positions.max(-1)[None]
    complete = ((np.arange(plan.k_blocks) + 1) * plan.k_block <= plan.keys)[None, :, None]
    result = array_module(g.q_positions).asarray(complete & np.full((plan.q_blocks, 1, 1), g.mask.dense_BNTS is None))
    if g.mask.causal:
        before = k_high <= q_low
        if g.mask.prefix_lengths_B is not None:
            before |= k_high < g.mask.prefix_lengths_B
        result &= before
    if g.mask.window is not None:
        left, right = g.mask.window
        if left is not None:
            result &= k_low >= q_high - left
        if right is not None:
            result &= k_high <= q_low + right
    if g.mask.kv_lengths_B is not None:
        result &= k_high < g.mask.kv_lengths_B
    if g.q_segments is not None and g.k_segments is not None:
        first = g.q_segments[..., :1]
        same_q = ((g.q_segments == first) & (first != 0)).all(-1)[:, None]
        same_k = (g.k_segments == g.k_segments[..., :1]).all(-1)[None]
        result &= same_q & same_k & (first[:, None, :, 0] == g.k_segments[None, :, :, 0])
    return result


def listed(flags: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The indices of the true entries of a matrix, (entries, 2) with the true ones first and in order; their count."""
    order = jnp.argsort(~flags.reshape(-1), stable=True).astype(jnp.int32)
    return jnp.stack([order // flags.shape[1], order % flags.shape[1]], axis=-1), flags.sum()


# --- one pair of blocks -----------------------------------------------------------------------------------------------


def block_of(plan: Plan, x: jax.Array, i, j) -> tuple[list, list[int]]:
    """Starts and sizes of a block in a (rows, heads, T, S) array padded to whole blocks; axes of 1 stay."""
    starts = [0, 0, 0 if x.shape[2] == 1 else i * plan.q_block, 0 if x.shape[3] == 1 else j * plan.k_block]
    return starts, [*x.shape[:2], min(x.shape[2], plan.q_block), min(x.shape[3], plan.k_block)]


def bias_block(plan: Plan, g: Geometry, bias: jax.Array | BucketBias, i, j) -> jax.Array:
    """The float32 (rows or 1, N or 1, q or 1, k or 1) bias of query block i against key block j."""
    if isinstance(bias, BucketBias):
        return bias.at(g.q_positions[i], g.k_positions[j])
    return jax.lax.dynamic_slice(bias, *block_of(plan, bias, i, j)).astype(jnp.float32)


def seen_block(plan: Plan, g: Geometry, dense: jax.Array | None, i, j) -> jax.Array:
    """Bool of shape (rows or 1, K or 1, G or 1, q, k): what query block i may see of key block j."""
    seen = visible(
        g.mask,
        g.q_positions[i],
        g.k_positions[j],
        None if g.q_segments is None else g.q_segments[i],
        None if g.k_segments is None else g.k_segments[j],
    )[:, None, None]
    if plan.keys % plan.k_block:
        seen &= j * plan.k_block + jnp.arange(plan.k_block) < plan.keys
    if dense is not None:
        block = jax.lax.dynamic_slice(dense, *block_of(plan, dense, i, j))
        seen = seen & group_heads(block, plan.heads)
    return seen


def finish_scores(plan: Plan, products, bias, seen) -> tuple[jax.Array, jax.Array]:
    """Scores from the products of queries and keys, -inf where nothing may be seen; and the capped ones, no bias."""
    s = products * plan.scale
    if plan.softcap is not None:
        s = plan.softcap * jnp.tanh(s / plan.softcap)
    capped = s
    if bias is not None:
        s = s + bias
    return s if seen is None else jnp.where(seen, s, -jnp.inf), capped


def kept_block(plan: Plan, g: Geometry, words, i, j, axis: int) -> jax.Array:
    """Dropout's decision for one pair of blocks: bool of shape (rows, K, G, q, k); (rows, K, k, G, q) for axis 2."""
    keys_first = axis == 2
    rows, heads = jnp.arange(plan.rows).reshape(-1, 1, 1, 1, 1), jnp.arange(plan.heads * plan.group)
    heads = heads.reshape(1, plan.heads, plan.group, 1, 1)
    q = g.q_positions[i][:, None, None, :, None]
    if keys_first:
        heads, q = jnp.moveaxis(heads, 2, 3), jnp.moveaxis(q, 3, 4)
    if g.mask.kv_positions_BS is None and (plan.k_block % 4 == 0 or plan.k_blocks == 1):
        return dropout.keep_run(words, plan.dropout_rate, rows, heads, q, j * plan.k_block, plan.k_block, axis)
    k = g.k_positions[j][:, None, None, None, :]
    return dropout.keep(words, plan.dropout_rate, rows, heads, q, jnp.moveaxis(k, 4, 2) if keys_first else k)


# --- the running softmax ----------------------------------------------------------------------------------------------


def weigh(s, top, total, across=lambda x: x[..., None], axis: int = -1, keepdims: bool = False):
    """One step of the running softmax over `axis`, keys, of s: (weights, factor on what came before, top, total).

    `across` spreads a value a query over the scores of it; with `keepdims` such values keep an axis of 1 for the keys.
    """
    new_top = jnp.maximum(top, s.max(axis, keepdims=keepdims))
    # Until a row has seen a key its maximum is -inf; 0 in its place keeps -inf minus -inf out of the exponentials.
    base = jnp.where(new_top == -jnp.inf, 0.0, new_top)
    p = jnp.exp(s - across(base))
    shrink = jnp.exp(top - base)
    return p, shrink, new_top, total * shrink + p.sum(axis, keepdims=keepdims)


def normalise(out, top, total, across=lambda x: x[..., None]):
    """The output and the log-sum-exp at the end of the running softmax."""
    empty = total == 0
    safe = jnp.where(empty, 1.0, total)
    return out / across(safe), jnp.where(empty, -jnp.inf, top + jnp.log(safe))


def with_sinks(out: jax.Array, lse: jax.Array, sinks: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Output and log-sum-exp when `sinks`, which broadcast to lse, take part in the softmax; out has one axis more."""
    if sinks is None:
        return out, lse
    sinks = sinks.astype(jnp.float32)
    top = jnp.maximum(lse, sinks)
    base = jnp.where(jnp.isfinite(top), top, 0.0)  # a sink of -inf is none
    mine = jnp.exp(lse - base)
    total = mine + jnp.exp(sinks - base)
    empty = total == 0
    safe = jnp.where(empty, 1.0, total)
    return out * (mine / safe)[..., None], jnp.where(empty, -jnp.inf, base + jnp.log(safe))


# --- what all backward passes share -----------------------------------------------------------------------------------


def row_terms(out_BTNH, lse_BTN, dout_BTNH, dlse_BTN) -> tuple[jax.Array, jax.Array]:
    """(stop_BTN, delta_BTN): a score's weight is exp(s - stop), and its gradient weight * (dp - delta).

    `out_BTNH` is float32: of an output rounded to half precision the difference would lose most of a small dq.
    """
    # The sum of weight * dp over a row is dout . out; the gradient of lse adds weight * dlse.
    delta_BTN = jnp.sum(dout_BTNH.astype(jnp.float32) * out_BTNH, -1) - dlse_BTN
    # With an lse of +inf the weights exp(s - lse) of rows without a key, and of padding, are exactly zero.
    return jnp.where(jnp.isfinite(lse_BTN), lse_BTN, jnp.inf), delta_BTN


def sinks_gradient(sinks_N, stop_BTN, delta_BTN) -> jax.Array | None:
    """A sink carries no value, so its dp is 0."""
    if sinks_N is None:
        return None
    share = jnp.exp(sinks_N.astype(jnp.float32) - stop_BTN)
    return -jnp.sum(share * delta_BTN, (0, 1)).astype(sinks_N.dtype)


def nothing(q_BTNH, v_BSKH, sinks_N) -> tuple[jax.Array, jax.Array]:
    """Output and log-sum-exp of a call without a single key, query or row."""
    B, T, N, _ = q_BTNH.shape
    lse = jnp.full((B, T, N), -jnp.inf)
    out = jnp.zeros((B, T, N, v_BSKH.shape[3]), q_BTNH.dtype)
    return out, lse if sinks_N is None else jnp.broadcast_to(sinks_N.astype(jnp.float32), lse.shape)
