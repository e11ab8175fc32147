"""Attention on NVIDIA Hopper in Pallas Mosaic GPU: the entry and the forward kernel.

A block of threads stays on its multiprocessor and takes one piece of work after another: a tile of queries of one
head, heavy ones first. One warpgroup copies keys and values into a ring in shared memory; each of the others owns 64
queries, and while one does its softmax the tensor cores do the products of the other. Which blocks of keys a tile
needs, and which of them need the mask, is listed beforehand; what a call does not use costs nothing.

Sources: Dao et al. 2022 (FlashAttention); Shah et al. 2024 (FlashAttention-3) for the division of labour.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from llm.attention import blocks
from llm.attention import mosaic_gpu_backward as backward
from llm.attention import mosaic_gpu_decode as decode
from llm.attention import mosaic_gpu_tiles as tiles
from llm.attention.bias import BucketBias
from llm.attention.block_sizes import Blocks, block_sizes
from llm.attention.mask import Mask
from llm.attention.mosaic_gpu_tiles import ROWS, Settings, Side, Tile
from llm.attention.pallas_versions import launch, matrices, spread
from llm.attention.passes import Passes
from llm.attention.target import target

HOPPER_MULTIPROCESSORS = 132

WIDTHS = (64, 128, 256)
MOST_BUCKETS = 64


def why_not_here() -> str | None:
    """Why the kernels cannot run on the device compiled for, or None when they can."""
    here = target()
    if here.platform != "gpu":
        return f"needs an NVIDIA GPU of compute capability 9.x, the platform here is {here.platform}"
    return (
        None if str(here.capability).startswith("9.") else f"needs compute capability 9.x, here it is {here.capability}"
    )


def lacks(q, k, v, *, bias, **asked) -> str | None:
    """The first thing asked for that the kernels do not have."""
    width = max(q.shape[3], v.shape[3])
    buckets = bias.table_RN.shape[0] if isinstance(bias, BucketBias) else 0
    reasons = {
        f"takes float16 and bfloat16, q is {q.dtype}": q.dtype not in (jnp.float16, jnp.bfloat16),
        f"needs one dtype, got {q.dtype}, {k.dtype} and {v.dtype}": not q.dtype == k.dtype == v.dtype,
        f"needs head widths of at most {WIDTHS[-1]}, got {width}": width > WIDTHS[-1],
        f"has room for {MOST_BUCKETS} buckets of a bias, got {buckets}": buckets > MOST_BUCKETS,
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def mosaic_gpu(
    q_BTNH, k_BSKH, v_BSKH, *, mask: Mask, bias, scale, softcap, sinks_N, dropout_rate, dropout_words, precision
) -> tuple[jax.Array, jax.Array]:
    """Attention by our Hopper kernels. Returns out_BTNH in the dtype of q and lse_BTN in float32.

    For calls of which `lacks` says nothing. `precision` is the tensor cores' own: half-precision products summed in
    float32. A head width is padded to the next of `WIDTHS`, and a length that is no multiple of the block costs a
    padded copy. The gradient of an array bias with both a T and an S axis writes the gradient of the scores, float32
    (B, N, T, S); others stay small. It is computed only where it is used.
    """
    if 0 in (*q_BTNH.shape[:3], k_BSKH.shape[1]):
        return blocks.nothing(q_BTNH, v_BSKH, sinks_N)
    s = _settings(q_BTNH, k_BSKH, v_BSKH, mask, bias, scale, softcap, dropout_rate)
    q, k, v = (_widened(s, x) for x in (q_BTNH, k_BSKH, v_BSKH))
    result: Any = attend(s, q, k, v, bias, sinks_N, mask, dropout_words)  # custom_vjp hides its type
    out, lse = result
    return out[..., : v_BSKH.shape[3]], lse


def passes(
    q_BTNH, k_BSKH, v_BSKH, *, mask: Mask, bias, scale, softcap, dropout_rate, dropout_words, precision
) -> Passes:
    """The passes of `mosaic_gpu`; no length is 0."""
    s = _settings(q_BTNH, k_BSKH, v_BSKH, mask, bias, scale, softcap, dropout_rate)
    width, value_width = q_BTNH.shape[3], v_BSKH.shape[3]
    q, k, v = (_widened(s, x) for x in (q_BTNH, k_BSKH, v_BSKH))

    def run_forward():
        out_BTNH, lse_BTN = forward(s, q, k, v, bias, mask, dropout_words, jnp.float32)
        return out_BTNH[..., :value_width], lse_BTN

    def run_backward(out_BTNH, lse_BTN, dout_BTNH, dlse_BTN):
        residuals = q, k, v, bias, None, mask, dropout_words, _widened(s, out_BTNH), lse_BTN
        dq, dk, dv, dbias, *_ = _attend_backward(s, residuals, (_widened(s, dout_BTNH), dlse_BTN))
        return dq[..., :width], dk[..., :width], dv[..., :value_width], dbias

    return Passes(run_forward, run_backward)


def _settings(q_BTNH, k_BSKH, v_BSKH, mask: Mask, bias, scale, softcap, dropout_rate) -> Settings:
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    width = next(w for w in WIDTHS if w >= max(H, v_BSKH.shape[3]))
    features = (softcap is not None) + (bias is not None) + (dropout_rate > 0)
    here = target()
    forward_, dq, dkv, decoding = sizes(width, q_BTNH.dtype, features)
    return Settings(
        B, T, S, N, N // K, width, H**-0.5 if scale is None else scale, softcap, dropout_rate,
        Mask(mask.causal, mask.window), forward_, dq, dkv, decoding,
        ctas=here.cores or HOPPER_MULTIPROCESSORS, interpret=here.interpret or None,
    )  # fmt: skip


def _widened(s: Settings, x: jax.Array) -> jax.Array:
    """Heads padded to the width of the kernels."""
    return jnp.pad(x, [(0, 0)] * 3 + [(0, s.width - x.shape[3])])


def sizes(width: int, dtype, features: int = 0) -> tuple[Blocks, Blocks, Blocks, Blocks]:
    """Block sizes of the forward, dq, dk and dv, and decoding kernels.

    `features` counts soft cap, bias and dropout: each keeps something of a tile in registers, and two or more need
    tiles of half the columns, or registers spill.
    """
    kind = target().kind
    passes = "forward", "dq", "dkv", "decode"
    forward_, dq, dkv, decoding = (block_sizes("mosaic_gpu", which, kind, width, dtype) for which in passes)
    if features >= 2:
        half = lambda size: max(32, size // 64 * 32)  # noqa: E731
        forward_, dq = (dataclasses.replace(x, k_block=half(x.k_block)) for x in (forward_, dq))
        dkv = dataclasses.replace(dkv, q_block=half(dkv.q_block))
    return forward_, dq, dkv, decoding


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(s: Settings, q_BTNH, k_BSKH, v_BSKH, bias, sinks_N, mask, words) -> tuple[jax.Array, jax.Array]:
    """out_BTNH and lse_BTN of heads padded to the width of `s`."""
    out, lse = _forward(s, q_BTNH, k_BSKH, v_BSKH, bias, sinks_N, mask, words, exact=sinks_N is not None)
    return out.astype(q_BTNH.dtype), lse


def _attend_forward(s, q_BTNH, k_BSKH, v_BSKH, bias, sinks_N, mask, words):
    out, lse = _forward(s, q_BTNH, k_BSKH, v_BSKH, bias, sinks_N, mask, words, exact=True)
    return (out.astype(q_BTNH.dtype), lse), (q_BTNH, k_BSKH, v_BSKH, bias, sinks_N, mask, words, out, lse)


def _forward(s, q_BTNH, k_BSKH, v_BSKH, bias, sinks_N, mask, words, exact: bool):
    out, lse = forward(s, q_BTNH, k_BSKH, v_BSKH, bias, mask, words, jnp.float32 if exact else q_BTNH.dtype)
    return blocks.with_sinks(out, lse, sinks_N)


def _attend_backward(s, residuals, cotangents):
    q_BTNH, k_BSKH, v_BSKH, bias, sinks_N, mask, words, out_BTNH, lse_BTN = residuals
    dout_BTNH, dlse_BTN = cotangents
    stop_BTN, delta_BTN = blocks.row_terms(out_BTNH, lse_BTN, dout_BTNH, dlse_BTN)
    run = backward.Run(s, q_BTNH, k_BSKH, v_BSKH, bias, mask, words, dout_BTNH, stop_BTN, delta_BTN)
    dq, (dk, dv) = run.dq(), run.dkv()
    dsinks = blocks.sinks_gradient(sinks_N, stop_BTN, delta_BTN)
    return dq, dk, dv, None if bias is None else run.dbias(), dsinks, None, None


attend.defvjp(_attend_forward, _attend_backward)


# --- the forward kernel -----------------------------------------------------------------------------------------------


def forward(s: Settings, q_BTNH, k_BSKH, v_BSKH, bias, mask: Mask, words, dtype):
    """out_BTNH in `dtype` and lse_BTN, without sinks."""
    if decode.fits(s):
        folded, q, given, order, counts = decode.fold(s, q_BTNH, bias, mask)
        out, top, total = launch_forward(folded, q, k_BSKH, v_BSKH, given, order, counts, mask, jnp.float32)
        out, lse = decode.unfold(s, out, log_sum(top, total))
        return out.astype(dtype), lse
    q_block, k_block = s.forward.q_block, s.forward.k_block
    given = tiles.operands(s, mask, bias, words, q_block, k_block, turned=False)
    if isinstance(bias, BucketBias):
        given |= tiles.table(s, bias, mask, q_block, k_block, turned=False)
    if s.rate > 0 or isinstance(bias, BucketBias):
        given |= tiles.column_positions(s, given, mask, q_block, k_block, turned=False)
    order, counts = tiles.lists(s, mask, q_block, k_block, turned=False)
    out, top, total = launch_forward(s, q_BTNH, k_BSKH, v_BSKH, given, order, counts, mask, dtype)
    out = out[0].reshape(s.batch, -1, *q_BTNH.shape[2:])[:, : s.queries]
    lse_BNT = log_sum(top[0], total[0]).reshape(s.batch, s.heads, -1)[..., : s.queries]
    return out, jnp.swapaxes(lse_BNT, 1, 2)


def log_sum(top, total):
    """The log-sum-exp from a maximum in base 2 and the sum above it."""
    safe = jnp.where(total == 0, 1.0, total)
    return jnp.where(total == 0, -jnp.inf, top * math.log(2) + jnp.log(safe))


def launch_forward(s: Settings, q_BTNH, k_BSKH, v_BSKH, given: dict, order, counts, mask: Mask, dtype):
    """Runs the kernel: out (splits, B, row tiles, 64, N, H); maxima and sums (splits, B, N, row tiles, 64)."""
    q_block, k_block, stages = dataclasses.astuple(s.forward)
    consumers = q_block // ROWS
    q, k, v = (blocks.pad(x, 1, size) for x, size in ((q_BTNH, q_block), (k_BSKH, k_block), (v_BSKH, k_block)))
    B, T, N, H = q.shape
    row_tiles = T // ROWS
    items = s.splits * B * (T // q_block) * N
    names = ("q", "k", "v", "order", "counts", *given)
    statistics = jax.ShapeDtypeStruct((s.splits, B, N, row_tiles, ROWS), jnp.float32)
    outputs = [jax.ShapeDtypeStruct((s.splits, B, row_tiles, ROWS, N, H), dtype), statistics, statistics]
    scratch = [
        matrices(ROWS, H, q.dtype, consumers, over=k_block),
        *(matrices(k_block, H, q.dtype, stages, over=k_block) for _ in "kv"),
        plgpu.Barrier(num_arrivals=consumers),  # the queries are there
        plgpu.Barrier(num_arrivals=consumers),  # they may be overwritten
        *(plgpu.Barrier(num_barriers=stages) for _ in "kv"),
        *(plgpu.Barrier(num_arrivals=consumers, num_barriers=stages) for _ in "kv"),
    ]
    if consumers == 2:
        scratch.append(plgpu.Barrier(num_arrivals=2))
    body = functools.partial(_kernel, s, names, items, T // q_block, mask)
    return launch(
        body, [q, k, v, order, counts, *given.values()], outputs, scratch,
        ctas=min(items, s.ctas), threads=consumers + 1, interpret=s.interpret,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Item:
    """One piece of work: a part of the keys of a tile of queries of one head."""

    split: jax.Array
    batch: jax.Array
    head: jax.Array
    q_tile: jax.Array
    list_row: jax.Array  # of the lists of blocks
    whole: tuple  # (first, one past the last) of the blocks in which everything is visible
    masked: tuple  # those to mask


def _item(s: Settings, counts, q_tiles: int, heads: int, number) -> _Item:
    per_tile = s.batch * heads
    head = lax.rem(number, heads)
    batch = lax.rem(lax.div(number, heads), s.batch)
    rest = lax.div(number, per_tile)
    # The last tiles of queries see most when causal: they come first.
    q_tile, part = q_tiles - 1 - lax.rem(rest, q_tiles), lax.div(rest, q_tiles)
    row = batch if counts.shape[0] > 1 else jnp.int32(0)
    whole, end = counts[row, q_tile, 0], counts[row, q_tile, 1]
    start = jnp.int32(0)
    if s.splits > 1:
        each = lax.div(end + (s.splits - 1), s.splits)
        start = part * each
        end = jnp.minimum(start + each, end)
        start = jnp.minimum(start, end)
        whole = jnp.maximum(jnp.minimum(whole, end), start)
    return _Item(part, batch, head, q_tile, row, (start, whole), (whole, end))


def _kernel(s: Settings, names, items: int, q_tiles: int, mask: Mask, inputs, outputs, scratch):
    refs = dict(zip(names, inputs))
    q_smem, k_smem, v_smem, q_full, q_free, k_full, v_full, k_free, v_free, *turn = scratch
    q_block, k_block, stages = dataclasses.astuple(s.forward)
    consumers = q_block // ROWS
    heads = refs["q"].shape[2]
    ctas = min(items, s.ctas)
    cta, me = lax.axis_index("cta"), lax.axis_index("wg")
    rounds = lax.div(items - cta + (ctas - 1), ctas)

    def item(i) -> _Item:
        return _item(s, refs["counts"], q_tiles, heads, cta + i * ctas)

    @pl.when(me == consumers)
    def _copy():
        if consumers > 1:
            plgpu.set_max_registers(40, action="decrease")

        def one_item(i, step):
            it = item(i)
            pl.when(i > 0)(lambda: plgpu.barrier_wait(q_free))
            for c in range(consumers):
                rows = pl.ds(it.q_tile * q_block + c * ROWS, ROWS)
                plgpu.copy_gmem_to_smem(refs["q"].at[it.batch, rows, it.head], q_smem.at[c], q_full)
            key_head = lax.div(it.head, s.group)

            def one_block(n, step):
                slot = lax.rem(step, stages)
                rows = pl.ds(refs["order"][it.list_row, it.q_tile, n] * k_block, k_block)
                for name, smem, full, free in (("k", k_smem, k_full, k_free), ("v", v_smem, v_full, v_free)):
                    pl.when(step >= stages)(lambda free=free: plgpu.barrier_wait(free.at[slot]))
                    plgpu.copy_gmem_to_smem(refs[name].at[it.batch, rows, key_head], smem.at[slot], full.at[slot])
                return step + 1

            return lax.fori_loop(it.whole[0], it.masked[1], one_block, step)

        step = lax.fori_loop(0, rounds, one_item, jnp.int32(0))
        tiles.drain(step, stages, (k_free, v_free))
        plgpu.barrier_wait(q_free)

    @pl.when(me < consumers)
    def _compute():
        if consumers > 1:
            plgpu.set_max_registers(232, action="increase")

        def one_item(i, step):
            return _compute_item(s, refs, outputs, scratch, mask, item(i), me, step)

        lax.fori_loop(0, rounds, one_item, jnp.int32(0))


def _take_turn(turn) -> None:
    """Waits for the other warpgroup to come to its own turn."""
    for barrier in turn:
        plgpu.barrier_arrive(barrier)
        plgpu.barrier_wait(barrier)


def _compute_item(s: Settings, refs, outputs, scratch, mask: Mask, it: _Item, me, step):
    """The attention of 64 queries: the loop over their blocks of keys, and what is written at its end."""
    q_smem, k_smem, v_smem, q_full, q_free, k_full, v_full, k_free, v_free, *turn = scratch
    q_block, k_block, stages = dataclasses.astuple(s.forward)
    machine, width = s.machine, s.width
    shape = ROWS, k_block
    row_tile = it.q_tile * (q_block // ROWS) + me
    queries = tiles.side(machine, refs, "q", 0, it.batch, row_tile, row_tile * ROWS)
    plgpu.barrier_wait(q_full)
    if turn:
        # The second warpgroup is half a step behind the first: within an item only, as the first cannot begin the next
        # one before the second gives back its queries.
        pl.when(me == 1)(lambda: _take_turn(turn))

    def one_block(n, carry, masked: bool):
        out, top, total, step = carry
        slot = lax.rem(step, stages)
        tile = None
        if masked or {"bias", "table", "words"} & refs.keys():
            block = refs["order"][it.list_row, it.q_tile, n]
            keys: Side = tiles.side(machine, refs, "kv", 1, it.batch, block, block * k_block)
            tile = Tile(s, refs, shape, it.batch, it.head, queries, keys)
        plgpu.barrier_wait(k_full.at[slot])
        x = machine.product(q_smem.at[me], k_smem.at[slot], during=lambda: _take_turn(turn))
        plgpu.barrier_arrive(k_free.at[slot])
        x, factor, _ = tiles.finish(
            x, s.scale, s.softcap, tile.add_bias if tile is not None and tile.has_bias() else None
        )
        if masked and tile is not None and (seen := tile.seen()) is not None:
            x = jnp.where(seen, x, -jnp.inf)
        p, shrink, top, total = tiles.weigh(x, factor, top, total, lambda y: spread(y, shape, 0))
        if s.rate > 0 and tile is not None:
            p = tile.marked(p)
            p = jnp.where(tiles.survives(p), p, 0.0)
        out = out * spread(shrink, (ROWS, width), 0)
        half = p.astype(k_smem.dtype)
        out, top, total, half = lax.optimization_barrier((out, top, total, half))
        for barrier in turn:
            plgpu.barrier_arrive(barrier)
        plgpu.barrier_wait(v_full.at[slot])
        for barrier in turn:
            plgpu.barrier_wait(barrier)
        [out] = machine.add_products((out,), ((half, v_smem.at[slot]),))
        plgpu.barrier_arrive(v_free.at[slot])
        return out, top, total, step + 1

    carry = (
        machine.zeros(ROWS, width),
        machine.vector(jnp.full((ROWS,), -jnp.inf, jnp.float32)),
        machine.vector(jnp.zeros((ROWS,), jnp.float32)),
        step,
    )
    out, top, total, step = tiles.over_blocks(s, mask, k_block, it.whole, it.masked, one_block, carry)
    plgpu.barrier_arrive(q_free)
    if turn:
        pl.when(me == 0)(lambda: _take_turn(turn))
    out_ref, top_ref, total_ref = outputs
    # Dropped weights leave the others larger by 1 / (1 - rate).
    inverse = jnp.where(total == 0, 0.0, 1 / (total * (1 - s.rate)))
    out = out * spread(inverse, (ROWS, width), 0)
    out_ref[it.split, it.batch, row_tile, :, it.head] = out.astype(out_ref.dtype)
    top_ref[it.split, it.batch, it.head, row_tile] = top
    total_ref[it.split, it.batch, it.head, row_tile] = total
    return step
