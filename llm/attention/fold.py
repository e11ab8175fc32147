"""A few queries over a long cache: the query heads that share a key head become rows of one block of queries.

Keys and values are then read once a group. A call of T queries and N = K G heads is one of G T queries and K heads.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from llm.attention.blocks import Plan
from llm.attention.mask import Mask

# The most queries of a call that is decoding.
DECODE_QUERIES = 8


def fold(plan: Plan, q_BTNH: jax.Array, bias: Any, mask: Mask):
    """(q, bias, mask) of the folded call: q of (B, G T, K, H), and what an array bias and the mask say of each row."""
    B, T, _, H = q_BTNH.shape
    q = q_BTNH.reshape(B, T, plan.key_heads, plan.group, H).transpose(0, 3, 1, 2, 4).reshape(B, -1, plan.key_heads, H)

    def of_queries(x):
        return None if x is None else jnp.tile(x, (1, plan.group))

    positions, _ = mask.positions(plan.queries, plan.keys)
    mask = dataclasses.replace(
        mask, q_positions_BT=of_queries(positions), q_segments_BT=of_queries(mask.q_segments_BT),
        dense_BNTS=_of_scores(plan, mask.dense_BNTS),
    )  # fmt: skip
    return q, _of_scores(plan, bias), mask


def unfold(plan: Plan, out: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """out_BTNH and lse_BTN from those of the folded call, (B, G T, K, H) and (B, G T, K)."""
    B, T, K, G = plan.batch, plan.queries, plan.key_heads, plan.group
    out = out.reshape(B, G, T, K, -1).transpose(0, 2, 3, 1, 4).reshape(B, T, K * G, -1)
    return out, lse.reshape(B, G, T, K).transpose(0, 2, 3, 1).reshape(B, T, K * G)


def _of_scores(plan: Plan, x: jax.Array | None) -> jax.Array | None:
    """(B or 1, N or 1, T or 1, S or 1) -> (.., K or 1, G T or 1, S or 1)."""
    if x is None or x.shape[1:3] == (1, 1):
        return x
    b, n, t, s = x.shape
    G, T, K = plan.group, plan.queries, 1 if n == 1 else plan.key_heads
    x = jnp.broadcast_to(x.reshape(b, K, 1 if n == 1 else G, t, s), (b, K, G, T, s))
    return x.reshape(b, K, G * T, s)
