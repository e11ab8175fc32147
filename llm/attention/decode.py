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
    # One product a block, with the queries of each key head on the diagonal of a (K G T, K H) matrix: a product with
    # the heads as its batch would first copy the keys into (K, k, H), at several times the cost of reading them. It
    # multiplies K times too much, and that still hides behind the reading.
    # (Multiplying and summing without a product was faster from 4 queries a key head; jax 0.10.2 compiles it wrongly
    # on CPUs at 4 queries, 12 heads of 64 and blocks of 1,024 keys.)
    q = q_BTNH.astype(jnp.float32).reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)
    spread = jnp.einsum("BKMH,KJ->BKMJH", q, jnp.eye(K)).reshape(B, K * G * T, K * H)

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
        b, j = (0, 0) if n is None else (pairs[n, 0], pairs[n, 1])
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
        products = plan.product("mc,kc->mk", spread[b], k.reshape(block, -1))
        s, _ = blocks.finish_scores(plan, products.reshape(1, K, G, T, block), added, seen)
        p, shrink, new_top, new_total = blocks.weigh(s[0], top[b], total[b])
        values = plan.product("mk,kc->mc", p.reshape(-1, block), v.reshape(block, -1))
        values = jnp.einsum("KMKH->KMH", values.reshape(K, G * T, K, -1))
        new_out = out[b] * shrink[..., None] + values.reshape(K, G, T, -1)
        return out.at[b].set(new_out), top.at[b].set(new_top), total.at[b].set(new_total)

    rows = (B, K, G, T)
    empty = jnp.zeros((*rows, v_BSKH.shape[3])), jnp.full(rows, -jnp.inf), jnp.zeros(rows)
    if B * plan.k_blocks == 1:
        # Without a loop nothing is carried, so the cache is not copied into one.
        out, top, total = body(None, empty)
    else:
        out, top, total = jax.lax.fori_loop(0, count, body, empty)
    sinks = None if sinks_N is None else sinks_N.reshape(1, K, G, 1)
    out, lse = blocks.with_sinks(*blocks.normalise(out, top, total), sinks)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, -1), lse.transpose(0, 3, 1, 2).reshape(B, T, N)
