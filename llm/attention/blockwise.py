"""Attention over blocks of queries and keys in XLA: online softmax, hand-written backward, memory linear in length.

Only pairs of blocks in which something is visible are computed: they are listed first, and the loops run over that
list. Sources: Rabe and Staats 2021; Dao et al. 2022 (FlashAttention), whose backward this follows.

A call is cut into parts of some batch rows and key heads, one after the other, so that the scores of one pair of
blocks stay in the cache of a CPU. In a part, queries are split into blocks of shape (rows, K, G, q, H) and keys into
(rows, K, k, H), one leading axis over the blocks: a block is one contiguous matrix a key head. Scores are (.., q, k)
in the forward pass and (.., k, q) in the backward one, so that no product needs a matrix of scores transposed.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from llm.attention import blocks, dropout
from llm.attention.bias import BucketBias
from llm.attention.blocks import Geometry, Plan
from llm.attention.decode import decode
from llm.attention.fold import DECODE_QUERIES
from llm.attention.mask import Mask
from llm.attention.passes import Passes
from llm.attention.target import target

BLOCK = 512
# Scores of one step: 4 MiB in float32 stay in the cache of a CPU core or two; an accelerator wants much work at once.
SCORES_ON_CPU = 2**20
SCORES = 2**26
# A call of few queries reads keys and values where they lie, without bringing them into blocks first.
DECODE_BLOCK = 1024


def blockwise(
    q_BTNH, k_BSKH, v_BSKH, *, mask, bias, scale, softcap, sinks_N, dropout_rate, dropout_words, precision
) -> tuple[jax.Array, jax.Array]:
    """Attention in blocks. Returns out_BTNH in the dtype of q and the log-sum-exp lse_BTN in float32."""
    if 0 in (*q_BTNH.shape[:3], k_BSKH.shape[1]):
        return blocks.nothing(q_BTNH, v_BSKH, sinks_N)
    plan = _plan_of(q_BTNH, k_BSKH, scale, softcap=softcap, dropout_rate=dropout_rate, precision=precision)
    return _attend(plan, q_BTNH, k_BSKH, v_BSKH, bias, sinks_N, mask, dropout_words)


def passes(q_BTNH, k_BSKH, v_BSKH, *, mask, bias, scale, softcap, dropout_rate, dropout_words, precision) -> Passes:
    """The passes of `blockwise`; no length is 0."""
    plan = _plan_of(q_BTNH, k_BSKH, scale, softcap=softcap, dropout_rate=dropout_rate, precision=precision)
    arrays = q_BTNH, k_BSKH, v_BSKH, bias, None, mask, dropout_words

    def forward():
        _, (*_, out_BTNH, lse_BTN) = _forward(plan, *arrays)
        return out_BTNH, lse_BTN

    def backward(out_BTNH, lse_BTN, dout_BTNH, dlse_BTN):
        return _backward(plan, (*arrays, out_BTNH, lse_BTN), (dout_BTNH, dlse_BTN))[:4]

    return Passes(forward, backward)


def _plan_of(q_BTNH, k_BSKH, scale: float | None, **settings) -> Plan:
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    scores = SCORES_ON_CPU if target().platform == "cpu" else SCORES
    return _plan(B, T, S, K, N // K, scores, scale=H**-0.5 if scale is None else scale, **settings)


def _plan(batch, queries, keys, key_heads, group, scores, **settings) -> Plan:
    """Cuts a call so that one step has at most `scores` scores, if a block of one key head has no more."""
    k_block = min(BLOCK, keys)
    q_block = min(BLOCK, queries, max(32, scores // (group * k_block)))
    fit = max(1, scores // (group * q_block * k_block))  # key heads a step
    if fit >= key_heads:
        rows, heads = _largest_divisor(batch, fit // key_heads), key_heads
    else:
        rows, heads = 1, _largest_divisor(key_heads, fit)
    return Plan(batch, queries, keys, key_heads, group, rows, heads, q_block, k_block, **settings)


def _largest_divisor(n: int, limit: int) -> int:
    return next(d for d in range(min(n, limit), 0, -1) if n % d == 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan, q_BTNH, k_BSKH, v_BSKH, bias, sinks_N, mask, words):
    return _forward(plan, q_BTNH, k_BSKH, v_BSKH, bias, sinks_N, mask, words)[0]


# --- parts: rows of the batch and key heads ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Part:
    """Where a part starts: its first row and its first key head."""

    plan: Plan
    row: jax.Array | int
    head: jax.Array | int

    def _window(self, x: jax.Array, rows: int | None, heads: int | None) -> tuple[list, list[int]]:
        """Starts and sizes of this part in an array with rows and (query or key) heads on the given axes."""
        plan, sizes = self.plan, list(x.shape)
        starts: list[int | jax.Array] = [0] * x.ndim
        if rows is not None and x.shape[rows] == plan.batch:
            starts[rows], sizes[rows] = self.row, plan.rows
        if heads is not None and x.shape[heads] != 1:
            each = x.shape[heads] // plan.key_heads
            starts[heads], sizes[heads] = self.head * each, plan.heads * each
        return starts, sizes

    def of(self, x: jax.Array, rows: int | None, heads: int | None) -> jax.Array:
        starts, sizes = self._window(x, rows, heads)
        return x if sizes == list(x.shape) else jax.lax.dynamic_slice(x, starts, sizes)

    def put(self, x: jax.Array, update: jax.Array, rows: int | None, heads: int | None) -> jax.Array:
        starts, sizes = self._window(x, rows, heads)
        return update if sizes == list(x.shape) else jax.lax.dynamic_update_slice(x, update, starts)

    def of_mask(self, mask: Mask) -> Mask:
        cut = jax.tree.map(lambda x: self.of(x, 0, None), dataclasses.replace(mask, dense_BNTS=None))
        dense = mask.dense_BNTS
        return dataclasses.replace(cut, dense_BNTS=None if dense is None else self.of(dense, 0, 1))

    def of_bias(self, bias):
        if isinstance(bias, BucketBias):
            return dataclasses.replace(bias, table_RN=self.of(bias.table_RN, None, 1))
        return None if bias is None else self.of(bias, 0, 1)

    def words(self, words):
        return None if words is None else dropout.moved(words, self.row, self.head * self.plan.group)


def _over_parts(plan: Plan, body, carry):
    """Runs body(part, carry) over the parts of a call; a single part needs no loop."""
    across = plan.key_heads // plan.heads
    parts = plan.batch // plan.rows * across
    if parts == 1:
        return body(_Part(plan, 0, 0), carry)
    return jax.lax.fori_loop(
        0, parts, lambda n, carry: body(_Part(plan, n // across * plan.rows, n % across * plan.heads), carry), carry
    )


def _over_pairs(plan: Plan, g: Geometry, body, carry):
    """Runs body(i, j, carry) over the pairs of blocks to compute; a single pair needs no loop."""
    if plan.q_blocks * plan.k_blocks == 1:
        return body(0, 0, carry)
    pairs, count = blocks.listed(blocks.needed(plan, g).any(-1))
    return jax.lax.fori_loop(0, count, lambda n, carry: body(pairs[n, 0], pairs[n, 1], carry), carry)


# --- the layout of blocks in a part -----------------------------------------------------------------------------------


def _q_blocks(plan: Plan, x_BTNH: jax.Array, fill: float = 0.0) -> jax.Array:
    """(rows, T, N, H) -> (blocks, rows, K, G, q, H)."""
    B, _, N, H = x_BTNH.shape
    x = blocks.pad(x_BTNH, 1, plan.q_block, constant_values=fill)
    x = x.reshape(B, plan.q_blocks, plan.q_block, plan.heads, N // plan.heads, H)
    return x.transpose(1, 0, 3, 4, 2, 5)


def _from_q_blocks(plan: Plan, x: jax.Array) -> jax.Array:
    """(blocks, rows, K, G, q, H) -> (rows, T, N, H)."""
    _, B, K, G, _, H = x.shape
    return x.transpose(1, 0, 4, 2, 3, 5).reshape(B, -1, K * G, H)[:, : plan.queries]


def _k_blocks(plan: Plan, x_BSKH: jax.Array) -> jax.Array:
    """(rows, S, K, H) -> (blocks, rows, K, k, H)."""
    B, _, K, H = x_BSKH.shape
    x = blocks.pad(x_BSKH, 1, plan.k_block).reshape(B, plan.k_blocks, plan.k_block, K, H)
    return x.transpose(1, 0, 3, 2, 4)


def _from_k_blocks(plan: Plan, x: jax.Array) -> jax.Array:
    """(blocks, rows, K, k, H) -> (rows, S, K, H)."""
    _, B, K, _, H = x.shape
    return x.transpose(1, 0, 3, 2, 4).reshape(B, -1, K, H)[:, : plan.keys]


def _turned(x: jax.Array) -> jax.Array:
    """The last two axes exchanged in memory: the barrier keeps XLA from handing its dot a strided operand."""
    return jax.lax.optimization_barrier(jnp.swapaxes(x, -1, -2))


def _padded(plan: Plan, bias, mask: Mask):
    bias = bias if bias is None or isinstance(bias, BucketBias) else blocks.pad_scores(plan, bias)
    return bias, None if mask.dense_BNTS is None else blocks.pad_scores(plan, mask.dense_BNTS)


# --- forward ----------------------------------------------------------------------------------------------------------


def _forward(plan, q_BTNH, k_BSKH, v_BSKH, bias, sinks_N, mask, words):
    residuals = q_BTNH, k_BSKH, v_BSKH, bias, sinks_N, mask, words
    if _decodes(plan):
        k_block = min(DECODE_BLOCK, plan.keys)
        whole = dataclasses.replace(plan, rows=1, heads=plan.key_heads, q_block=plan.queries, k_block=k_block)
        out_BTNH, lse_BTN = decode(whole, q_BTNH, k_BSKH, v_BSKH, bias, sinks_N, mask)
        return (out_BTNH.astype(q_BTNH.dtype), lse_BTN), (*residuals, out_BTNH, lse_BTN)
    rows = q_BTNH.shape[:3]
    out_BTNH, lse_BTN = jnp.zeros((*rows, v_BSKH.shape[3]), jnp.float32), jnp.zeros(rows, jnp.float32)

    def body(part: _Part, carry):
        q, k, v = (part.of(x, 0, 2) for x in (q_BTNH, k_BSKH, v_BSKH))
        sinks = None if sinks_N is None else part.of(sinks_N, None, 0)
        out, lse = _forward_part(plan, q, k, v, part.of_bias(bias), sinks, part.of_mask(mask), part.words(words))
        return part.put(carry[0], out, 0, 2), part.put(carry[1], lse, 0, 2)

    out_BTNH, lse_BTN = _over_parts(plan, body, (out_BTNH, lse_BTN))
    return (out_BTNH.astype(q_BTNH.dtype), lse_BTN), (*residuals, out_BTNH, lse_BTN)


def _decodes(plan: Plan) -> bool:
    """Whether the call is few queries over a long cache; an accelerator is better off with rows in parallel."""
    few = plan.queries <= DECODE_QUERIES and plan.keys >= 4 * plan.queries and plan.dropout_rate == 0
    return few and target().platform == "cpu"


def _forward_part(plan, q_BTNH, k_BSKH, v_BSKH, bias, sinks_N, mask, words):
    g = blocks.geometry(plan, mask)
    q, k, v = _q_blocks(plan, q_BTNH), _k_blocks(plan, k_BSKH), _k_blocks(plan, v_BSKH)
    bias, dense = _padded(plan, bias, mask)

    def body(i, j, carry):
        out, top, total = carry
        s = plan.product("BKGqH,BKHk->BKGqk", q[i], _turned(k[j]))
        added = None if bias is None else blocks.group_heads(blocks.bias_block(plan, g, bias, i, j), plan.heads)
        s, _ = blocks.finish_scores(plan, s, added, blocks.seen_block(plan, g, dense, i, j))
        p, shrink, new_top, new_total = blocks.weigh(s, top[i], total[i])
        if plan.dropout_rate > 0:
            kept = blocks.kept_block(plan, g, words, i, j, axis=4)
            p = jnp.where(kept, p / (1 - plan.dropout_rate), 0.0)
        new_out = out[i] * shrink[..., None] + plan.product("BKGqk,BKkH->BKGqH", p.astype(v.dtype), v[j])
        return out.at[i].set(new_out), top.at[i].set(new_top), total.at[i].set(new_total)

    rows = q.shape[:-1]
    empty = jnp.zeros((*rows, v.shape[-1])), jnp.full(rows, -jnp.inf), jnp.zeros(rows)
    out, top, total = _over_pairs(plan, g, body, empty)
    sinks = None if sinks_N is None else sinks_N.reshape(1, 1, plan.heads, plan.group, 1)
    out, lse = blocks.with_sinks(*blocks.normalise(out, top, total), sinks)
    return _from_q_blocks(plan, out), _from_q_blocks(plan, lse[..., None])[..., 0]


# --- backward ---------------------------------------------------------------------------------------------------------


def _backward(plan, residuals, cotangents):
    q_BTNH, k_BSKH, v_BSKH, bias, sinks_N, mask, words, out_BTNH, lse_BTN = residuals
    dout_BTNH, dlse_BTN = cotangents
    stop_BTN, delta_BTN = blocks.row_terms(out_BTNH, lse_BTN, dout_BTNH, dlse_BTN)

    def body(part: _Part, carry):
        dq, dk, dv, dbias = carry
        q, dout, stop, delta = (part.of(x, 0, 2) for x in (q_BTNH, dout_BTNH, stop_BTN, delta_BTN))
        k, v = part.of(k_BSKH, 0, 2), part.of(v_BSKH, 0, 2)
        new_dq, new_dk, new_dv, new_dbias = _backward_part(
            plan, q, k, v, part.of_bias(bias), part.of_mask(mask), part.words(words), dout, stop, delta
        )
        dq, dk, dv = (part.put(x, new.astype(x.dtype), 0, 2) for x, new in ((dq, new_dq), (dk, new_dk), (dv, new_dv)))
        return dq, dk, dv, _add_to_bias(part, dbias, new_dbias)

    zeros = jnp.zeros_like(q_BTNH), jnp.zeros_like(k_BSKH), jnp.zeros_like(v_BSKH)
    dbias = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), bias)
    dq_BTNH, dk_BSKH, dv_BSKH, dbias = _over_parts(plan, body, (*zeros, dbias))
    dbias = jax.tree.map(lambda d, x: d.astype(x.dtype), dbias, bias)
    dsinks = blocks.sinks_gradient(sinks_N, stop_BTN, delta_BTN)
    return dq_BTNH, dk_BSKH, dv_BSKH, dbias, dsinks, None, None


def _add_to_bias(part: _Part, dbias, part_dbias):
    """Adds a part's gradient of its bias to that of the whole."""
    if isinstance(dbias, BucketBias):
        table = dbias.table_RN
        return dataclasses.replace(
            dbias, table_RN=part.put(table, part.of(table, None, 1) + part_dbias.table_RN, None, 1)
        )
    return None if dbias is None else part.put(dbias, part.of(dbias, 0, 1) + part_dbias, 0, 1)


def _backward_part(plan, q_BTNH, k_BSKH, v_BSKH, bias, mask, words, dout_BTNH, lse_BTN, delta_BTN):
    g = blocks.geometry(plan, mask)
    q, k, v = _q_blocks(plan, q_BTNH), _k_blocks(plan, k_BSKH), _k_blocks(plan, v_BSKH)
    dout, delta = _q_blocks(plan, dout_BTNH), _q_blocks(plan, delta_BTN[..., None])[..., 0]
    lse = _q_blocks(plan, lse_BTN[..., None], fill=jnp.inf)[..., 0]
    padded, dense = _padded(plan, bias, mask)

    def across(x):
        """A value a query against scores of (.., k, G, q)."""
        return x[:, :, None]

    def keys_first(x):
        return jnp.moveaxis(x, 4, 2)

    def body(i, j, carry):
        dq, dk, dv, dbias = carry
        s = plan.product("BKkH,BKHGq->BKkGq", k[j], _heads_first(q[i]))
        added = None
        if padded is not None:
            added = blocks.group_heads(blocks.bias_block(plan, g, padded, i, j), plan.heads)
            added = keys_first(added)
        s, capped = blocks.finish_scores(plan, s, added, keys_first(blocks.seen_block(plan, g, dense, i, j)))
        p = jnp.exp(s - across(lse[i]))
        dp = plan.product("BKkH,BKHGq->BKkGq", v[j], _heads_first(dout[i]))
        dropped = p
        if plan.dropout_rate > 0:
            kept = blocks.kept_block(plan, g, words, i, j, axis=2)
            dropped = jnp.where(kept, p / (1 - plan.dropout_rate), 0.0)
            dp = jnp.where(kept, dp / (1 - plan.dropout_rate), 0.0)
        ds = p * (dp - across(delta[i]))
        if bias is not None:
            dbias = _add_bias_gradient(plan, g, padded, dbias, jnp.moveaxis(ds, 2, 4), i, j)
        if plan.softcap is not None:
            ds *= 1 - jnp.square(capped / plan.softcap)
        ds = ds.astype(q.dtype)
        dq = dq.at[i].add(plan.product("BKHk,BKkGq->BKHGq", _turned(k[j]), ds))
        dk = dk.at[j].add(plan.product("BKkGq,BKGqH->BKkH", ds, q[i]))
        dv = dv.at[j].add(plan.product("BKkGq,BKGqH->BKkH", dropped.astype(dout.dtype), dout[i]))
        return dq, dk, dv, dbias

    def zeros(x):
        return jnp.zeros(x.shape, jnp.float32)

    blocked_dq = jnp.zeros((plan.q_blocks, plan.rows, plan.heads, q.shape[-1], plan.group, plan.q_block))
    start = blocked_dq, zeros(k), zeros(v), jax.tree.map(zeros, padded)
    dq, dk, dv, dbias = _over_pairs(plan, g, body, start)
    dq, dk = jnp.moveaxis(dq, 3, 5) * plan.scale, dk * plan.scale
    dbias = jax.tree.map(lambda d, x: d[tuple(map(slice, x.shape))], dbias, bias)
    return _from_q_blocks(plan, dq), _from_k_blocks(plan, dk), _from_k_blocks(plan, dv), dbias


def _heads_first(x: jax.Array) -> jax.Array:
    """(rows, K, G, q, H) -> (rows, K, H, G, q), in memory."""
    return jax.lax.optimization_barrier(jnp.moveaxis(x, 4, 2))


def _add_bias_gradient(plan: Plan, g: Geometry, bias, dbias, ds, i, j):
    ds_BNqk = ds.reshape(ds.shape[0], -1, *ds.shape[3:])
    if isinstance(bias, BucketBias):
        _, pull = jax.vjp(lambda b: blocks.bias_block(plan, g, b, i, j), bias)
        if g.q_positions.shape[1] == g.k_positions.shape[1] == 1:
            ds_BNqk = ds_BNqk.sum(0, keepdims=True)
        return jax.tree.map(jnp.add, dbias, pull(ds_BNqk)[0])
    starts, sizes = blocks.block_of(plan, bias, i, j)
    summed = ds_BNqk.sum([a for a in range(4) if sizes[a] == 1 and ds_BNqk.shape[a] > 1], keepdims=True)
    return jax.lax.dynamic_update_slice(dbias, jax.lax.dynamic_slice(dbias, starts, sizes) + summed, starts)


_attend.defvjp(_forward, _backward)
