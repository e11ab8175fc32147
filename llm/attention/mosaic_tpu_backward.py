"""The backward kernels of `mosaic_tpu`: dq, dk and dv in one pass, and the gradient of a bias in another."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from llm.attention import blocks
from llm.attention.bias import BucketBias
from llm.attention.blocks import Plan
from llm.attention.mask import Mask
from llm.attention.mosaic_tpu_tile import (
    LANES,
    Call,
    Operands,
    Tile,
    flip,
    key_head,
    operands,
    scores_block,
    steps,
    tall,
    wide,
)

# dk and dv of one key head are kept on the chip in float32; longer calls are cut along the keys.
RESIDENT_BYTES = 16 * 2**20


def gradients(call: Call, q_BTNH, k_BSKH, v_BSKH, bias, mask: Mask, words, dout_BTNH, stop_BTN, delta_BTN):
    """(dq, dk, dv, dbias) in the dtypes of q, k, v and bias."""
    plan = call.backward
    rows = q_BTNH, dout_BTNH, stop_BTN, delta_BTN
    each = 4 * (tall(q_BTNH.shape[3], LANES) + tall(v_BSKH.shape[3], LANES))
    most = max(1, RESIDENT_BYTES // (each * plan.k_block)) * plan.k_block
    dq, dks, dvs = jnp.float32(0), [], []
    for start in range(0, plan.keys, most):
        end = min(start + most, plan.keys)
        part, part_mask, part_bias = _cut(plan, mask, bias, start, end)
        dq_part, dk, dv = _fused(
            call, part, part_mask, part_bias, words, k_BSKH[:, start:end], v_BSKH[:, start:end], rows
        )
        dq, dks, dvs = dq + dq_part, [*dks, dk], [*dvs, dv]
    dq = dq.astype(q_BTNH.dtype)
    dbias = None if bias is None else _bias_gradient(call, plan, mask, bias, words, k_BSKH, v_BSKH, rows)
    return dq, jnp.concatenate(dks, 1), jnp.concatenate(dvs, 1), dbias


def _cut(plan: Plan, mask: Mask, bias, start: int, end: int):
    """The plan, mask and bias of the keys from start to end."""
    if (start, end) == (0, plan.keys):
        return plan, mask, bias
    q_positions, kv_positions = mask.positions(plan.queries, plan.keys)
    kv_positions = jnp.broadcast_to(kv_positions, (plan.batch, plan.keys))[:, start:end]
    dense, segments = mask.dense_BNTS, mask.kv_segments_BS
    mask = dataclasses.replace(
        mask,
        q_positions_BT=jnp.broadcast_to(q_positions, (plan.batch, plan.queries)),
        kv_positions_BS=kv_positions,
        kv_segments_BS=None if segments is None else segments[:, start:end],
        dense_BNTS=None if dense is None else dense[..., start:end],
    )
    if bias is not None and not isinstance(bias, BucketBias) and bias.shape[3] > 1:
        bias = bias[..., start:end]
    return dataclasses.replace(plan, keys=end - start), mask, bias


def _add_rows(given: Operands, plan: Plan, rows, k_BSKH, v_BSKH) -> None:
    """q, k, v, the cotangent of the output and the two numbers a query."""
    q_BTNH, dout_BTNH, stop_BTN, delta_BTN = rows
    for name, x in (("q", q_BTNH), ("dout", dout_BTNH)):
        x = wide(x, plan.q_block)
        given.add(name, x, (None, plan.q_block, x.shape[2] // q_BTNH.shape[2]), lambda w: (w.b, w.i, w.n))
    for name, x in (("k", k_BSKH), ("v", v_BSKH)):
        x = wide(x, plan.k_block)
        block = (None, plan.k_block, x.shape[2] // plan.key_heads)
        given.add(name, x, block, lambda w: (w.b, w.j, key_head(plan, w.n)))
    for name, x, fill in (("stop", stop_BTN, jnp.inf), ("delta", delta_BTN, 0.0)):
        x = blocks.pad(x.transpose(0, 2, 1)[:, :, None], 3, plan.q_block, constant_values=fill)
        given.add(name, x, (None, None, 1, plan.q_block), lambda w: (w.b, w.n, 0, w.i))


def _weights(tile: Tile, masked: bool):
    """(p after dropout, the gradient of the scores with the bias, that of the products unscaled) of a tile."""
    rate = tile.plan.dropout_rate
    s, capped = tile.scores(masked)
    p = jnp.exp(s - tile.refs["stop"][...])
    dp = tile.product(tile.refs["v"][...], tile.refs["dout"][...], (1, 1))
    dropped = p
    if rate > 0:
        kept = tile.kept()
        dropped, dp = (jnp.where(kept, x / (1 - rate), 0.0) for x in (p, dp))
    ds = p * (dp - tile.refs["delta"][...])
    cap = tile.plan.softcap
    return dropped, ds, ds if cap is None else ds * (1 - jnp.square(capped / cap))


def _fused(call: Call, plan: Plan, mask: Mask, bias, words, k_BSKH, v_BSKH, rows):
    """dq in float32 if the keys are a part of those of the call, else in the dtype of q; dk and dv in theirs."""
    B, T, N, H = rows[0].shape
    K, G, bq, bk = plan.key_heads, plan.group, plan.q_block, plan.k_block
    given = operands(plan, mask, bias, words, major="q", at=lambda b, k, g, p: (b, k * G + g, p), grid=4)
    _add_rows(given, plan, rows, k_BSKH, v_BSKH)
    S, width, v_width = (given.blocked[name].shape[i] for name, i in (("k", 1), ("k", 2), ("v", 2)))
    width, v_width = width // K, v_width // K
    dq_dtype = rows[0].dtype if plan.keys == call.backward.keys else jnp.float32

    def kernel(*refs):
        b, k, g, p = (pl.program_id(axis) for axis in range(4))
        named = given.named(refs)
        tile = Tile(plan, mask, bias, named, b, k * G + g, p)
        dq, dk_out, dv_out, dq_sum, dk_sum, dv_sum, dk_block, dv_block = refs[given.inputs :][:8]

        @pl.when((g == 0) & (p == 0))
        def _():
            dk_sum[...] = jnp.zeros_like(dk_sum)
            dv_sum[...] = jnp.zeros_like(dv_sum)

        @pl.when(tile.first)
        def _():
            dq_sum[...] = jnp.zeros_like(dq_sum)

        def step(masked: bool):
            dropped, _, ds = _weights(tile, masked)
            q_qH, k_kH, dout_qH = (tile.refs[name][...] for name in ("q", "k", "dout"))
            ds = ds.astype(q_qH.dtype)
            here = pl.ds(tile.j * bk, bk)
            dq_sum[...] += tile.product(k_kH, ds, (0, 0))
            dk_sum[here, :] += tile.product(ds, q_qH, (1, 0))
            dv_sum[here, :] += tile.product(dropped.astype(dout_qH.dtype), dout_qH, (1, 0))

        steps(tile, step)

        @pl.when(tile.last)
        def _():
            dq[...] = (dq_sum[...].T * plan.scale).astype(dq.dtype)

        @pl.when((g == G - 1) & (p == pl.num_programs(3) - 1))
        def _():
            def write(j, _):
                here = pl.ds(j * bk, bk)
                dk_block[...] = (dk_sum[here, :] * plan.scale).astype(dk_block.dtype)
                dv_block[...] = dv_sum[here, :].astype(dv_block.dtype)
                pltpu.sync_copy(dk_block, dk_out.at[b, here, pl.ds(k * width, width)])
                pltpu.sync_copy(dv_block, dv_out.at[b, here, pl.ds(k * v_width, v_width)])

            jax.lax.fori_loop(0, S // bk, write, None)

    padded = given.blocked["q"].shape[1]
    dq, dk, dv = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=given.prefetched,
            grid=(B, K, G, given.steps),
            in_specs=given.specs,
            out_specs=[
                pl.BlockSpec((None, bq, width), given.where(lambda w: (w.b, w.i, w.n))),
                pl.BlockSpec(memory_space=pl.ANY),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            scratch_shapes=[
                pltpu.VMEM((width, bq), jnp.float32),
                pltpu.VMEM((S, width), jnp.float32),
                pltpu.VMEM((S, v_width), jnp.float32),
                pltpu.VMEM((bk, width), k_BSKH.dtype),
                pltpu.VMEM((bk, v_width), v_BSKH.dtype),
                *given.scratch.values(),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((B, padded, N * width), dq_dtype),
            jax.ShapeDtypeStruct((B, S, K * width), k_BSKH.dtype),
            jax.ShapeDtypeStruct((B, S, K * v_width), v_BSKH.dtype),
        ],
        compiler_params=call.compiler_params(free=2, grid=4),
        interpret=call.interpret,
        name="attention_backward",
    )(*given.arrays)
    dq = dq.reshape(B, padded, N, width)[:, :T, :, :H]
    dk = dk.reshape(B, S, K, width)[:, : plan.keys, :, :H]
    return dq, dk, dv.reshape(B, S, K, v_width)[:, : plan.keys, :, : v_BSKH.shape[3]]


def _bias_gradient(call: Call, plan: Plan, mask: Mask, bias, words, k_BSKH, v_BSKH, rows):
    """The gradient of an array bias or of a table, summed in float32 over what shares a number.

    The grid runs over the numbers of the result first and over the rows and heads that share them last, so that a
    block of it stays on the chip until it is complete.
    """
    B, N, bq, bk = plan.batch, plan.key_heads * plan.group, plan.q_block, plan.k_block
    table = isinstance(bias, BucketBias)
    shape = (1, N, 1, 1) if table else bias.shape
    own_row, own_head, per_query, per_key = (size > 1 for size in shape)
    outer = (B if own_row else 1) * (N if own_head else 1)
    inner = B * N // outer

    def at(o, p, s):
        divide, remainder = jax.lax.div, jax.lax.rem
        b = (divide(o, N) if own_head else o) if own_row else (s if own_head else divide(s, N))
        n = (remainder(o, N) if own_row else o) if own_head else (s if own_row else remainder(s, N))
        return b, n, p

    # A list in the order in which a block of the result is complete before the next one starts.
    major = "k" if per_key and not per_query else "q"
    given = operands(plan, mask, bias, words, major=major, at=at, union=not own_row, every=per_query and per_key)
    _add_rows(given, plan, rows, k_BSKH, v_BSKH)
    if table:
        buckets = tall(bias.table_RN.shape[0], LANES)
        out_shape, block, where = (N, 1, buckets), (None, 1, buckets), lambda w: (w.n, 0, 0)
    else:
        out_shape = tuple(tall(size, unit) if size > 1 else 1 for size, unit in zip(shape, (1, 1, bq, bk)))
        block, where = scores_block(plan, out_shape)

    def kernel(*refs):
        o, p, s = (pl.program_id(axis) for axis in range(3))
        named = given.named(refs)
        tile = Tile(plan, mask, bias, named, *at(o, p, s))
        out = refs[given.inputs]
        starts = tile.first if per_query or per_key else p == 0
        if per_query and per_key:
            starts = p >= 0

        @pl.when(starts & (s == 0))
        def _():
            out[...] = jnp.zeros_like(out)

        def step(masked: bool):
            _, ds, _ = _weights(tile, masked)
            if table:
                lane = jax.lax.broadcasted_iota(jnp.int32, (1, buckets), 1)

                def add(r, inside):
                    out[...] += jnp.where(lane == r, jnp.sum(jnp.where(inside, ds, 0.0)), 0.0)

                tile.each_bucket(add)
                return
            out[...] += _flipped_sum(ds, per_query, per_key)

        steps(tile, step)

    out = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=given.prefetched,
            grid=(outer, given.steps, inner),
            in_specs=given.specs,
            out_specs=pl.BlockSpec(block, given.where(where)),
            scratch_shapes=[*given.scratch.values()],
        ),
        out_shape=jax.ShapeDtypeStruct(out_shape, jnp.float32),
        compiler_params=call.compiler_params(free=1),
        interpret=call.interpret,
        name="attention_bias_gradient",
    )(*given.arrays)
    if table:
        return dataclasses.replace(bias, table_RN=out[:, 0, : bias.table_RN.shape[0]].T.astype(bias.table_RN.dtype))
    return out[tuple(map(slice, shape))].astype(bias.dtype)


def _flipped_sum(ds, per_query: bool, per_key: bool):
    """ds of (keys, queries) summed over what is shared, as (queries or 1, keys or 1)."""
    if not per_key:
        ds = ds.sum(0, keepdims=True)
    if not per_query:
        ds = ds.sum(1, keepdims=True)
    return flip(ds)
