"""Attention of a few queries over many keys, as when generating: keys and values are read once, where they lie.

The work is reading the cache, so nothing is copied into blocks, and a block of keys that a row cannot see, beyond its
length or outside its window, is not read. Forward only; the backward pass is that of `blockwise`.
"""

import dataclasses

import jax
import jax.numpy as jnp

from llm.attention import blocks
from llm.attention.bias import BucketBias
from llm.attention.blocks import Plan
from llm.attention.mask import Mask


def decode(plan: Plan, q_BTNH, k_BSKH, v_BSKH, bias, sinks_N, mask: Mask) -> tuple[jax.Array, jax.Array]:
    """Returns out_BTNH and lse_BTN in float32. `plan` has one row and all key heads a part, and all queries a block."""
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    G, block = N // K, plan.k_block
    # (B, key blocks): each pair is a block of keys that some query of the row needs.
    flags = jnp.broadcast_to(blocks.needed(plan, blocks.geometry(plan, mask))[0].T, (B, plan.k_blocks))
    pairs, count = blocks.listed(flags)
    q_positions, k_positions = mask.positions(T, S)
    q = q_BTNH.astype(jnp.float32).reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)
    spread = None
    if G * T < ONE_PRODUCT_BELOW or K == 1:
        spread = jnp.einsum("BKMH,KJ->BKMJH", q, jnp.eye(K))

    def cut(x, b, axis, start):
        """One row, and one block of an axis of keys; axes of 1 stay."""
        starts, sizes = [0] * x.ndim, list(x.shape)
        if sizes[0] == B:
            starts[0], sizes[0] = b, 1
        if axis is not None and sizes[axis] != 1:
            starts[axis], sizes[axis] = start, block
        return jax.lax.dynamic_slice(x, starts, sizes)

    def body(n, carry):
        out, top, total = carry
        b, j = pairs[n, 0], pairs[n, 1]
        # The last block moves back to lie inside the cache; what it repeats of the block before is hidden.
        start = jnp.minimum(j * block, S - block)
        row = dataclasses.replace(
            jax.tree.map(lambda x: cut(x, b, None, 0), dataclasses.replace(mask, dense_BNTS=None)),
            kv_positions_BS=None, kv_segments_BS=None,
        )  # fmt: skip
        q_at, k_at = cut(q_positions, b, None, 0), cut(k_positions, b, 1, start)
        segments = None if mask.kv_segments_BS is None else cut(mask.kv_segments_BS, b, 1, start)
        seen = blocks.visible(row, q_at, k_at, row.q_segments_BT, segments)[:, None, None]
        seen &= start + jnp.arange(block) >= j * block
        if mask.dense_BNTS is not None:
            seen = seen & blocks.group_heads(cut(mask.dense_BNTS, b, 3, start), K)
        added = None
        if isinstance(bias, BucketBias):
            added = blocks.group_heads(bias.at(q_at, k_at), K)
        elif bias is not None:
            added = blocks.group_heads(cut(bias, b, 3, start).astype(jnp.float32), K)
        # bfloat16 products are exact in float32, and a CPU has no faster ones.
        k, v = (cut(x, b, 1, start)[0].astype(jnp.float32) for x in (k_BSKH, v_BSKH))
        products = _queries_by_keys(plan, q[b], None if spread is None else spread[b], k)
        s, _ = blocks.finish_scores(plan, products.reshape(1, K, G, T, block), added, seen)
        p, shrink, new_top, new_total = blocks.weigh(s[0], top[b], total[b])
        values = _weights_by_values(plan, p.reshape(K, G * T, block), v, spread is not None)
        new_out = out[b] * shrink[..., None] + values.reshape(K, G, T, -1)
        return out.at[b].set(new_out), top.at[b].set(new_top), total.at[b].set(new_total)

    rows = (B, K, G, T)
    empty = jnp.zeros((*rows, v_BSKH.shape[3])), jnp.full(rows, -jnp.inf), jnp.zeros(rows)
    out, top, total = jax.lax.fori_loop(0, count, body, empty)
    sinks = None if sinks_N is None else sinks_N.reshape(1, K, G, 1)
    out, lse = blocks.normalise(out, top, total, sinks)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, -1), lse.transpose(0, 3, 1, 2).reshape(B, T, N)


# A matrix product with the heads as its batch would first bring the keys into (K, k, H), at several times the cost of
# reading them. Two forms read them as they lie: one product with the queries on the diagonal of a matrix, which
# multiplies K times too much and is still bound by reading, and multiply-and-add, which wins from 4 queries a key head.
ONE_PRODUCT_BELOW = 4


def _queries_by_keys(plan: Plan, q_KMH: jax.Array, spread_KMKH: jax.Array | None, k_kKH: jax.Array) -> jax.Array:
    """Products of the M = G T queries a key head and its keys, float32 of shape (K, M, k)."""
    if spread_KMKH is None:
        return (q_KMH[None] * k_kKH[:, :, None]).sum(-1).transpose(1, 2, 0)
    K, M, _ = q_KMH.shape
    s = plan.product("mc,kc->mk", spread_KMKH.reshape(K * M, -1), k_kKH.reshape(k_kKH.shape[0], -1))
    return s.reshape(K, M, -1)


def _weights_by_values(plan: Plan, p_KMk: jax.Array, v_kKH: jax.Array, one_product: bool) -> jax.Array:
    """Values weighted by the softmax, float32 of shape (K, M, H)."""
    K, M, k = p_KMk.shape
    if not one_product:
        return (p_KMk.transpose(2, 0, 1)[..., None] * v_kKH[:, :, None]).sum(0)
    out = plan.product("mk,kc->mc", p_KMk.reshape(K * M, k), v_kKH.reshape(k, -1))
    return jnp.einsum("KMKH->KMH", out.reshape(K, M, K, -1))
