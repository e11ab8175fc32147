"""Attention over blocks of queries and keys in XLA: online softmax, hand-written backward, memory linear in length.

Only pairs of blocks in which something is visible are computed: they are listed first, and the loops run over that
list. Sources: Rabe and Staats 2021; Dao et al. 2022 (FlashAttention), whose backward this follows.

Inside, queries are split into blocks of shape (B, K, G, q, H) and keys into (B, K, k, H), one leading axis over the
blocks: a block is then one contiguous matrix a key head, and its product is one batched matrix product.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from llm.attention import dropout
from llm.attention.bias import BucketBias
from llm.attention.mask import Mask, visible

BLOCK = 512


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The static part of a call."""

    queries: int
    keys: int
    q_block: int
    k_block: int
    scale: float
    softcap: float | None
    dropout_rate: float
    precision: jax.lax.PrecisionLike

    @property
    def q_blocks(self) -> int:
        return -(-self.queries // self.q_block)

    @property
    def k_blocks(self) -> int:
        return -(-self.keys // self.k_block)


def blockwise(
    q_BTNH, k_BSKH, v_BSKH, *, mask, bias, scale, softcap, sinks_N, dropout_rate, dropout_words, precision
) -> tuple[jax.Array, jax.Array]:
    """Attention in blocks. Returns out_BTNH in the dtype of q and the log-sum-exp lse_BTN in float32."""
    T, S = q_BTNH.shape[1], k_BSKH.shape[1]
    plan = _Plan(
        queries=T,
        keys=S,
        q_block=min(BLOCK, T),
        k_block=min(BLOCK, S),
        scale=q_BTNH.shape[-1] ** -0.5 if scale is None else scale,
        softcap=softcap,
        dropout_rate=dropout_rate,
        precision=precision,
    )
    if T == 0 or S == 0:
        out = jnp.zeros((*q_BTNH.shape[:3], v_BSKH.shape[3]), q_BTNH.dtype)
        lse = jnp.full(q_BTNH.shape[:3], -jnp.inf)
        return out, lse if sinks_N is None else jnp.broadcast_to(sinks_N.astype(jnp.float32), lse.shape)
    return _attend(plan, q_BTNH, k_BSKH, v_BSKH, bias, sinks_N, mask, dropout_words)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan, q_BTNH, k_BSKH, v_BSKH, bias, sinks_N, mask, words):
    return _forward(plan, q_BTNH, k_BSKH, v_BSKH, bias, sinks_N, mask, words)[0]


# --- the layout of blocks ---------------------------------------------------------------------------------------------


def _pad(x: jax.Array, axis: int, size: int, **how) -> jax.Array:
    short = -x.shape[axis] % size
    return jnp.pad(x, [(0, short if i == axis % x.ndim else 0) for i in range(x.ndim)], **how) if short else x


def _q_blocks(plan: _Plan, x_BTNH: jax.Array, key_heads: int, fill: float = 0.0) -> jax.Array:
    """(B, T, N, H) -> (blocks, B, K, G, q, H)."""
    B, _, N, H = x_BTNH.shape
    x = _pad(x_BTNH, 1, plan.q_block, constant_values=fill).reshape(
        B, plan.q_blocks, plan.q_block, key_heads, N // key_heads, H
    )
    return x.transpose(1, 0, 3, 4, 2, 5)


def _from_q_blocks(plan: _Plan, x: jax.Array) -> jax.Array:
    """(blocks, B, K, G, q, H) -> (B, T, N, H)."""
    _, B, K, G, _, H = x.shape
    return x.transpose(1, 0, 4, 2, 3, 5).reshape(B, -1, K * G, H)[:, : plan.queries]


def _k_blocks(plan: _Plan, x_BSKH: jax.Array) -> jax.Array:
    """(B, S, K, H) -> (blocks, B, K, k, H)."""
    B, _, K, H = x_BSKH.shape
    x = _pad(x_BSKH, 1, plan.k_block).reshape(B, plan.k_blocks, plan.k_block, K, H)
    return x.transpose(1, 0, 3, 2, 4)


def _from_k_blocks(plan: _Plan, x: jax.Array) -> jax.Array:
    """(blocks, B, K, k, H) -> (B, S, K, H)."""
    _, B, K, _, H = x.shape
    return x.transpose(1, 0, 3, 2, 4).reshape(B, -1, K, H)[:, : plan.keys]


@dataclasses.dataclass(frozen=True)
class _Geometry:
    """Positions and segments split into blocks, (blocks, B or 1, block), and the pairs of blocks to compute."""

    mask: Mask
    q_positions: jax.Array
    k_positions: jax.Array
    q_segments: jax.Array | None
    k_segments: jax.Array | None
    pairs: jax.Array  # (q_blocks * k_blocks, 2), those to compute first, ordered by query block, then key block
    count: jax.Array | int


def _geometry(plan: _Plan, mask: Mask) -> _Geometry:
    def split(x, block, **how):
        return _pad(x, 1, block, **how).reshape(x.shape[0], -1, block).transpose(1, 0, 2)

    q_positions, k_positions = mask.positions(plan.queries, plan.keys)
    q_positions = split(q_positions, plan.q_block, mode="edge")
    k_positions = split(k_positions, plan.k_block, mode="edge")
    q_segments = k_segments = None
    if mask.q_segments_BT is not None and mask.kv_segments_BS is not None:
        q_segments, k_segments = split(mask.q_segments_BT, plan.q_block), split(mask.kv_segments_BS, plan.k_block)

    # A pair is needed when the ranges of its positions and segments could meet: never too few, at times too many.
    q_low, q_high = q_positions.min(-1)[:, None], q_positions.max(-1)[:, None]
    k_low, k_high = k_positions.min(-1)[None], k_positions.max(-1)[None]
    needed = jnp.ones((plan.q_blocks, plan.k_blocks, 1), bool)
    if mask.causal:
        reach = k_low <= q_high
        if mask.prefix_lengths_B is not None:
            reach |= k_low < mask.prefix_lengths_B
        needed &= reach
    if mask.window is not None:
        left, right = mask.window
        if left is not None:
            needed &= k_high >= q_low - left
        if right is not None:
            needed &= k_low <= q_high + right
    if mask.kv_lengths_B is not None:
        needed &= k_low < mask.kv_lengths_B
    if q_segments is not None and k_segments is not None:
        ceiling = jnp.iinfo(q_segments.dtype).max
        q_first = jnp.where(q_segments == 0, ceiling, q_segments).min(-1)[:, None]
        k_first = jnp.where(k_segments == 0, ceiling, k_segments).min(-1)[None]
        q_last, k_last = q_segments.max(-1)[:, None], k_segments.max(-1)[None]
        needed &= jnp.maximum(q_first, k_first) <= jnp.minimum(q_last, k_last)
    needed = needed.any(-1).reshape(-1)
    order = jnp.argsort(~needed, stable=True).astype(jnp.int32)
    pairs = jnp.stack([order // plan.k_blocks, order % plan.k_blocks], axis=-1)
    return _Geometry(mask, q_positions, k_positions, q_segments, k_segments, pairs, needed.sum())


def _loop(plan: _Plan, geometry: _Geometry, body, carry):
    """Runs body(i, j, carry) over the pairs of blocks to compute; a single pair needs no loop."""
    if plan.q_blocks * plan.k_blocks == 1:
        return body(0, 0, carry)
    return jax.lax.fori_loop(
        0, geometry.count, lambda n, carry: body(geometry.pairs[n, 0], geometry.pairs[n, 1], carry), carry
    )


# --- one pair of blocks -----------------------------------------------------------------------------------------------


def _bias_block(plan: _Plan, bias: jax.Array, i, j) -> jax.Array:
    """The (B or 1, N or 1, q or 1, k or 1) block of a bias array that was padded to whole blocks."""
    starts = [0, 0, 0 if bias.shape[2] == 1 else i * plan.q_block, 0 if bias.shape[3] == 1 else j * plan.k_block]
    sizes = [*bias.shape[:2], min(bias.shape[2], plan.q_block), min(bias.shape[3], plan.k_block)]
    return jax.lax.dynamic_slice(bias, starts, sizes)


def _pad_scores(plan: _Plan, x: jax.Array) -> jax.Array:
    """Pads the T and S axes of a (B, N, T, S) array to whole blocks; axes of 1 stay."""
    if x.shape[2] > 1:
        x = _pad(x, 2, plan.q_block)
    return _pad(x, 3, plan.k_block) if x.shape[3] > 1 else x


def _group(x: jax.Array, key_heads: int) -> jax.Array:
    """(B or 1, N or 1, q, k) -> (B or 1, K or 1, G or 1, q, k)."""
    b, n, *rest = x.shape
    return x.reshape(b, 1, 1, *rest) if n == 1 else x.reshape(b, key_heads, n // key_heads, *rest)


def _scores(plan: _Plan, geometry: _Geometry, q, k, bias, dense, i, j):
    """Scores of query block i against key block j in float32, -inf where nothing may be seen; capped ones too."""
    s = jnp.einsum("BKGqH,BKkH->BKGqk", q[i], k[j], precision=plan.precision, preferred_element_type=jnp.float32)
    s *= plan.scale
    capped = s
    if plan.softcap is not None:
        s = capped = plan.softcap * jnp.tanh(s / plan.softcap)
    K = k.shape[2]
    if isinstance(bias, BucketBias):
        s += _group(bias.at(geometry.q_positions[i], geometry.k_positions[j]), K)
    elif bias is not None:
        s += _group(_bias_block(plan, bias, i, j).astype(jnp.float32), K)
    seen = visible(
        geometry.mask,
        geometry.q_positions[i],
        geometry.k_positions[j],
        None if geometry.q_segments is None else geometry.q_segments[i],
        None if geometry.k_segments is None else geometry.k_segments[j],
    )[:, None, None]
    if plan.keys % plan.k_block:
        seen &= j * plan.k_block + jnp.arange(plan.k_block) < plan.keys
    if dense is not None:
        seen = seen & _group(_bias_block(plan, dense, i, j), K)
    return jnp.where(seen, s, -jnp.inf), capped


def _kept(plan: _Plan, geometry: _Geometry, words, shape, i, j) -> jax.Array:
    """Dropout's decision for one block, bool of `shape` (B, K, G, q, k)."""
    B, K, G, _, _ = shape
    return dropout.keep(
        words,
        plan.dropout_rate,
        jnp.arange(B).reshape(B, 1, 1, 1, 1),
        jnp.arange(K * G).reshape(1, K, G, 1, 1),
        geometry.q_positions[i][:, None, None, :, None],
        geometry.k_positions[j][:, None, None, None, :],
    )


# --- forward and backward ---------------------------------------------------------------------------------------------


def _forward(plan, q_BTNH, k_BSKH, v_BSKH, bias, sinks_N, mask, words):
    K = k_BSKH.shape[2]
    geometry = _geometry(plan, mask)
    q, k, v = _q_blocks(plan, q_BTNH, K), _k_blocks(plan, k_BSKH), _k_blocks(plan, v_BSKH)
    padded = bias if bias is None or isinstance(bias, BucketBias) else _pad_scores(plan, bias)
    dense = None if mask.dense_BNTS is None else _pad_scores(plan, mask.dense_BNTS)

    def body(i, j, carry):
        out, top, total = carry
        s, _ = _scores(plan, geometry, q, k, padded, dense, i, j)
        new_top = jnp.maximum(top[i], s.max(-1))
        # Until a row has seen a key its maximum is -inf; 0 in its place keeps -inf minus -inf out of the exponentials.
        base = jnp.where(jnp.isfinite(new_top), new_top, 0.0)
        p = jnp.exp(s - base[..., None])
        shrink = jnp.exp(top[i] - base)
        new_total = total[i] * shrink + p.sum(-1)
        if plan.dropout_rate > 0:
            p = jnp.where(_kept(plan, geometry, words, p.shape, i, j), p / (1 - plan.dropout_rate), 0.0)
        pv = jnp.einsum(
            "BKGqk,BKkH->BKGqH", p.astype(v.dtype), v[j], precision=plan.precision, preferred_element_type=jnp.float32
        )
        new_out = out[i] * shrink[..., None] + pv
        return out.at[i].set(new_out), top.at[i].set(new_top), total.at[i].set(new_total)

    rows = q.shape[:-1]
    out, top, total = _loop(
        plan,
        geometry,
        body,
        (
            jnp.zeros((*rows, v.shape[-1]), jnp.float32),
            jnp.full(rows, -jnp.inf, jnp.float32),
            jnp.zeros(rows, jnp.float32),
        ),
    )
    if sinks_N is not None:
        sinks = _per_head(sinks_N, K)
        new_top = jnp.maximum(top, sinks)
        shrink = jnp.exp(top - new_top)
        out, total, top = out * shrink[..., None], total * shrink + jnp.exp(sinks - new_top), new_top
    empty = total == 0
    safe = jnp.where(empty, 1.0, total)
    lse = jnp.where(empty, -jnp.inf, top + jnp.log(safe))
    out_BTNH = _from_q_blocks(plan, out / safe[..., None]).astype(q_BTNH.dtype)
    lse_BTN = _from_q_blocks(plan, lse[..., None])[..., 0]
    return (out_BTNH, lse_BTN), (q_BTNH, k_BSKH, v_BSKH, bias, sinks_N, mask, words, out_BTNH, lse_BTN)


def _per_head(x_N: jax.Array, key_heads: int) -> jax.Array:
    """A value a query head, shaped to meet (blocks, B, K, G, q)."""
    return x_N.astype(jnp.float32).reshape(1, 1, key_heads, -1, 1)


def _backward(plan, residuals, cotangents):
    q_BTNH, k_BSKH, v_BSKH, bias, sinks_N, mask, words, out_BTNH, lse_BTN = residuals
    dout_BTNH, dlse_BTN = cotangents
    K = k_BSKH.shape[2]
    geometry = _geometry(plan, mask)
    q, k, v = _q_blocks(plan, q_BTNH, K), _k_blocks(plan, k_BSKH), _k_blocks(plan, v_BSKH)
    dout = _q_blocks(plan, dout_BTNH, K)
    padded = bias if bias is None or isinstance(bias, BucketBias) else _pad_scores(plan, bias)
    dense = None if mask.dense_BNTS is None else _pad_scores(plan, mask.dense_BNTS)
    # Every score of a row gets p * (dp - sum(p dp)); the sum is dout . out, and the gradient of lse adds p * dlse.
    delta_BTN = jnp.sum(dout_BTNH.astype(jnp.float32) * out_BTNH.astype(jnp.float32), -1) - dlse_BTN
    delta = _q_blocks(plan, delta_BTN[..., None], K)[..., 0]
    # With an lse of +inf the weights exp(s - lse) of rows without a key, and of padding, are exactly zero.
    lse = jnp.where(jnp.isfinite(lse_BTN), lse_BTN, jnp.inf)[..., None]
    lse = _q_blocks(plan, lse, K, fill=jnp.inf)[..., 0]

    def product(subscripts, a, b):
        return jnp.einsum(subscripts, a, b, precision=plan.precision, preferred_element_type=jnp.float32)

    def body(i, j, carry):
        dq, dk, dv, dbias = carry
        s, capped = _scores(plan, geometry, q, k, padded, dense, i, j)
        p = jnp.exp(s - lse[i][..., None])
        dp = product("BKGqH,BKkH->BKGqk", dout[i], v[j])
        dropped = p
        if plan.dropout_rate > 0:
            kept = _kept(plan, geometry, words, p.shape, i, j)
            dropped = jnp.where(kept, p / (1 - plan.dropout_rate), 0.0)
            dp = jnp.where(kept, dp / (1 - plan.dropout_rate), 0.0)
        ds = p * (dp - delta[i][..., None])
        if bias is not None:
            dbias = _add_bias_gradient(plan, geometry, padded, dbias, ds, i, j)
        if plan.softcap is not None:
            ds *= 1 - jnp.square(capped / plan.softcap)
        ds = (ds * plan.scale).astype(q.dtype)
        dq = dq.at[i].add(product("BKGqk,BKkH->BKGqH", ds, k[j]))
        dk = dk.at[j].add(product("BKGqk,BKGqH->BKkH", ds, q[i]))
        dv = dv.at[j].add(product("BKGqk,BKGqH->BKkH", dropped.astype(dout.dtype), dout[i]))
        return dq, dk, dv, dbias

    def zeros(x):
        return jnp.zeros(x.shape, jnp.float32)

    dq, dk, dv, dbias = _loop(plan, geometry, body, (zeros(q), zeros(k), zeros(v), jax.tree.map(zeros, padded)))
    dsinks = None
    if sinks_N is not None:
        # A sink carries no value, so its dp is 0.
        share = jnp.exp(sinks_N.astype(jnp.float32) - lse_BTN)
        dsinks = -jnp.sum(share * delta_BTN, (0, 1)).astype(sinks_N.dtype)
    if bias is not None:
        dbias = jax.tree.map(lambda d, x: d[tuple(map(slice, x.shape))].astype(x.dtype), dbias, bias)
    return (
        _from_q_blocks(plan, dq).astype(q_BTNH.dtype),
        _from_k_blocks(plan, dk).astype(k_BSKH.dtype),
        _from_k_blocks(plan, dv).astype(v_BSKH.dtype),
        dbias,
        dsinks,
        None,
        None,
    )


def _add_bias_gradient(plan, geometry, bias, dbias, ds, i, j):
    ds_BNqk = ds.reshape(ds.shape[0], -1, *ds.shape[3:])
    if isinstance(bias, BucketBias):
        _, pull = jax.vjp(lambda b: b.at(geometry.q_positions[i], geometry.k_positions[j]), bias)
        if geometry.q_positions.shape[1] == geometry.k_positions.shape[1] == 1:
            ds_BNqk = ds_BNqk.sum(0, keepdims=True)
        return jax.tree.map(jnp.add, dbias, pull(ds_BNqk)[0])
    block = _bias_block(plan, dbias, i, j)
    summed = ds_BNqk.sum([a for a in range(4) if block.shape[a] == 1 and ds_BNqk.shape[a] > 1], keepdims=True)
    starts = [0, 0, 0 if bias.shape[2] == 1 else i * plan.q_block, 0 if bias.shape[3] == 1 else j * plan.k_block]
    return jax.lax.dynamic_update_slice(dbias, block + summed, starts)


_attend.defvjp(_forward, _backward)
