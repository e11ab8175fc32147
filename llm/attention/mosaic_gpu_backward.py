"""The backward kernels of `mosaic_gpu`: one over tiles of queries for dq, one over tiles of keys for dk and dv.

Nothing is summed by more than one block of threads, so results do not depend on the order in which they run. The
gradient of a bias is a third pass over the same tiles, which XLA leaves out of a program that does not use it.
Source: Dao et al. 2022 (FlashAttention), section B.4.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from llm.attention import blocks
from llm.attention import mosaic_gpu_tiles as tiles
from llm.attention.bias import BucketBias
from llm.attention.mask import Mask
from llm.attention.mosaic_gpu_tiles import LOG2E, ROWS, Settings, Tile
from llm.attention.pallas_versions import launch, matrices, spread

CONSUMERS = 2
MEMORY_REGISTERS, REGISTERS = 24, 240


@dataclasses.dataclass(frozen=True)
class Run:
    """One backward pass: the arguments of the call, the cotangent of its output, and two values a query.

    `stop_BTN` is the log-sum-exp, +inf where a query sees nothing; `delta_BTN` is sum(dout out) less dlse.
    """

    s: Settings
    q_BTNH: jax.Array
    k_BSKH: jax.Array
    v_BSKH: jax.Array
    bias: Any
    mask: Mask
    words: jax.Array | None
    dout_BTNH: jax.Array
    stop_BTN: jax.Array
    delta_BTN: jax.Array

    def dq(self) -> jax.Array:
        """dq_BTNH in the dtype of q."""
        dq = self._over_queries("dq")
        return dq.reshape(self.s.batch, -1, *self.q_BTNH.shape[2:])[:, : self.s.queries]

    def dkv(self) -> tuple[jax.Array, jax.Array]:
        """dk_BSKH and dv_BSKH in the dtype of k."""
        dk, dv = self._over_keys("dkv")
        return tuple(x.reshape(self.s.batch, -1, *self.k_BSKH.shape[2:])[:, : self.s.keys] for x in (dk, dv))

    def dbias(self):
        """The gradient of the bias, in its own form."""
        s, bias = self.s, self.bias
        if isinstance(bias, BucketBias):
            order, _ = tiles.buckets(bias)
            table_NR = self._over_queries("table").sum((0, 2, 4))  # (B, N, row tiles, R', 64)
            table_RN = jnp.zeros(bias.table_RN.shape, jnp.float32).at[order].set(table_NR.T)
            return dataclasses.replace(bias, table_RN=table_RN.astype(bias.table_RN.dtype))
        by_query, by_key = bias.shape[2] > 1, bias.shape[3] > 1
        if by_query and by_key:
            full = self._over_queries("tile").reshape(s.batch, s.heads, -1, -(-s.keys // s.dq.k_block) * s.dq.k_block)
            seen = self._computed(full.shape[2:])
            full = jnp.where(seen[:, None], full, 0.0)[:, :, : s.queries, : s.keys]
        elif by_key:
            full = self._over_keys("column").reshape(s.batch, s.heads, 1, -1)[..., : s.keys]
        else:
            full = self._over_queries("row").reshape(s.batch, s.heads, -1, 1)[:, :, : s.queries]
        axes = [a for a in range(4) if bias.shape[a] == 1]
        return full.sum(axes, keepdims=True).astype(bias.dtype)

    def _computed(self, shape) -> jax.Array:
        """Where the pass over queries wrote: bool (B or 1, padded T, padded S)."""
        s = self.s
        p = tiles.plan(s, s.dq.q_block, s.dq.k_block)
        needed = jnp.moveaxis(blocks.needed(p, blocks.geometry(p, self.mask)), 2, 0)
        for axis, size in ((1, s.dq.q_block), (2, s.dq.k_block)):
            needed = jnp.repeat(needed, size, axis)
        return needed[:, : shape[0], : shape[1]]

    def _by_query(self, size: int) -> jax.Array:
        """(B, N, 2, T): the log-sum-exp in base 2, and delta, padded to whole blocks."""
        stop = blocks.pad(self.stop_BTN * LOG2E, 1, size, constant_values=jnp.inf)
        return jnp.stack([stop, blocks.pad(self.delta_BTN, 1, size)], 1).transpose(0, 3, 1, 2)

    def _given(self, q_block: int, k_block: int, turned: bool) -> dict[str, jax.Array]:
        s, mask = self.s, self.mask
        given = tiles.operands(s, mask, self.bias, self.words, q_block, k_block, turned)
        if isinstance(self.bias, BucketBias):
            given |= tiles.table(s, self.bias, mask, q_block, k_block, turned)
        return given | tiles.column_positions(s, given, mask, q_block, k_block, turned)

    def _over_queries(self, mode: str) -> jax.Array:
        """Runs `_dq_kernel`: dq (B, row tiles, 64, N, H), or what `mode` says of the bias."""
        s = self.s
        q_block, k_block, stages = dataclasses.astuple(s.dq)
        stages -= mode == "table"  # the sums by bucket take the place of a stage
        consumers = q_block // ROWS
        q, dout = (blocks.pad(x, 1, q_block) for x in (self.q_BTNH, self.dout_BTNH.astype(self.q_BTNH.dtype)))
        k, v = (blocks.pad(x, 1, k_block) for x in (self.k_BSKH, self.v_BSKH))
        B, T, N, H = q.shape
        row_tiles = T // ROWS
        rows = self._by_query(q_block).reshape(B, N, 2, row_tiles, ROWS)
        order, counts = tiles.lists(s, self.mask, q_block, k_block, turned=False)
        given = self._given(q_block, k_block, turned=False)
        used = given["edges"].shape[0] if "edges" in given else 0
        output = {
            "dq": ((B, row_tiles, ROWS, N, H), q.dtype),
            "row": ((B, N, row_tiles, ROWS), jnp.float32),
            "table": ((B, N, row_tiles, used, ROWS), jnp.float32),
            "tile": ((B, N, row_tiles, ROWS, k.shape[1] // k_block, k_block), jnp.float32),
        }[mode]
        scratch = [
            *(matrices(ROWS, H, q.dtype, consumers, over=k_block) for _ in "qo"),
            *(matrices(k_block, H, q.dtype, stages, over=k_block) for _ in "kv"),
            plgpu.Barrier(num_arrivals=2 * consumers),
            plgpu.Barrier(num_arrivals=consumers),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=consumers, num_barriers=stages),
        ]
        if mode == "table":
            scratch.append(plgpu.SMEM((consumers, used, ROWS), jnp.float32))
        names = ("q", "k", "v", "dout", "rows", "order", "counts", *given)
        items = B * (T // q_block) * N
        body = functools.partial(_dq_kernel, s, mode, names, items, T // q_block, self.mask)
        [result] = launch(
            body, [q, k, v, dout, rows, order, counts, *given.values()], [jax.ShapeDtypeStruct(*output)], scratch,
            ctas=min(items, s.ctas), threads=consumers + 1, interpret=s.interpret,
        )  # fmt: skip
        return result

    def _over_keys(self, mode: str):
        """Runs `_dkv_kernel`: dk and dv (B, row tiles, 64, K, H), or sums over queries (B, N, row tiles, 64)."""
        s = self.s
        q_block, k_block, stages = dataclasses.astuple(s.dkv)
        q, dout = (blocks.pad(x, 1, q_block) for x in (self.q_BTNH, self.dout_BTNH.astype(self.q_BTNH.dtype)))
        k, v = (blocks.pad(x, 1, k_block) for x in (self.k_BSKH, self.v_BSKH))
        B, S, K, H = k.shape
        row_tiles, own = S // ROWS, k_block // ROWS
        order, counts = tiles.lists(s, self.mask, q_block, k_block, turned=True)
        given = self._given(q_block, k_block, turned=True)
        heads = s.heads if mode == "column" else K
        outputs = [jax.ShapeDtypeStruct((B, row_tiles, ROWS, K, H), k.dtype)] * 2
        if mode == "column":
            outputs = [jax.ShapeDtypeStruct((B, heads, row_tiles, ROWS), jnp.float32)]
        scratch = [
            *(matrices(ROWS, H, k.dtype, own, over=q_block) for _ in "kv"),
            *(matrices(q_block, H, k.dtype, stages, over=q_block) for _ in "qo"),
            plgpu.SMEM((stages, 2, q_block), jnp.float32),
            plgpu.Barrier(num_arrivals=2 * own),
            plgpu.Barrier(num_arrivals=CONSUMERS),
            plgpu.Barrier(num_arrivals=3, num_barriers=stages),
            plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages),
        ]
        names = ("q", "k", "v", "dout", "rows", "order", "counts", *given)
        items = B * (S // k_block) * heads
        body = functools.partial(_dkv_kernel, s, mode, names, items, S // k_block, self.mask)
        result = launch(
            body, [q, k, v, dout, self._by_query(q_block), order, counts, *given.values()], outputs, scratch,
            ctas=min(items, s.ctas), threads=CONSUMERS + 1, interpret=s.interpret,
        )  # fmt: skip
        return result if mode == "dkv" else result[0]


# --- what both kernels share ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Item:
    """A tile of queries or keys of one head, and the blocks that it meets: visible as a whole, and to mask."""

    batch: jax.Array
    head: jax.Array
    tile: jax.Array
    list_row: jax.Array
    whole: tuple
    masked: tuple


def _item(counts, batch: int, heads: int, tile_count: int, last_first: bool, number) -> _Item:
    head = lax.rem(number, heads)
    row = lax.rem(lax.div(number, heads), batch)
    tile = lax.div(number, batch * heads)
    # When causal the last queries and the first keys have most to do: they come first.
    tile = tile_count - 1 - tile if last_first else tile
    list_row = row if counts.shape[0] > 1 else jnp.int32(0)
    whole, end = counts[list_row, tile, 0], counts[list_row, tile, 1]
    return _Item(row, head, tile, list_row, (jnp.int32(0), whole), (whole, end))


def _divide_labour(
    consumers: int, items: int, ctas: int, make_item: Callable, copy: Callable, compute: Callable, drained: Callable
):
    """The two roles: copy(item, count, step) -> step in the last warpgroup, compute(item, me, step) in the others."""
    cta, me = lax.axis_index("cta"), lax.axis_index("wg")
    rounds = lax.div(items - cta + (ctas - 1), ctas)

    @pl.when(me == consumers)
    def _copy():
        if consumers > 1:
            plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")
        step = lax.fori_loop(0, rounds, lambda i, step: copy(make_item(cta + i * ctas), i, step), jnp.int32(0))
        drained(step)

    @pl.when(me < consumers)
    def _compute():
        if consumers > 1:
            plgpu.set_max_registers(REGISTERS, action="increase")
        lax.fori_loop(0, rounds, lambda i, step: compute(make_item(cta + i * ctas), me, step), jnp.int32(0))


def _logits(s: Settings, x, tile: Tile, masked: bool):
    """(scores with what is hidden at -inf, factor to base 2, scores under the cap) of products."""
    x, factor, capped = tiles.finish(x, s.scale, s.softcap, tile.add_bias if tile.has_bias() else None)
    if masked and (seen := tile.seen()) is not None:
        x = jnp.where(seen, x, -jnp.inf)
    return x, factor, capped


# --- dq ---------------------------------------------------------------------------------------------------------------


def _dq_kernel(s: Settings, mode: str, names, items: int, q_tiles: int, mask: Mask, inputs, outputs, scratch):
    """Modes: "dq"; "tile", "row" and "table" give the gradient of the scores as it is, by query, and by bucket."""
    refs = dict(zip(names, inputs))
    q_smem, o_smem, k_smem, v_smem, q_full, q_free, full, free, *buckets = scratch
    q_block, k_block, stages = dataclasses.astuple(s.dq)
    stages -= mode == "table"
    [out_ref] = outputs
    machine, shape, consumers = s.machine, (ROWS, k_block), q_block // ROWS

    def make_item(number):
        return _item(refs["counts"], s.batch, s.heads, q_tiles, True, number)

    def copy(it: _Item, i, step):
        pl.when(i > 0)(lambda: plgpu.barrier_wait(q_free))
        for c in range(consumers):
            rows = pl.ds(it.tile * q_block + c * ROWS, ROWS)
            for name, smem in (("q", q_smem), ("dout", o_smem)):
                plgpu.copy_gmem_to_smem(refs[name].at[it.batch, rows, it.head], smem.at[c], q_full)

        def one_block(n, step):
            slot = lax.rem(step, stages)
            rows = pl.ds(refs["order"][it.list_row, it.tile, n] * k_block, k_block)
            pl.when(step >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
            for name, smem in (("k", k_smem), ("v", v_smem)):
                source = refs[name].at[it.batch, rows, lax.div(it.head, s.group)]
                plgpu.copy_gmem_to_smem(source, smem.at[slot], full.at[slot])
            return step + 1

        return lax.fori_loop(it.whole[0], it.masked[1], one_block, step)

    def drained(step):
        tiles.drain(step, stages, [free])
        plgpu.barrier_wait(q_free)

    def compute(it: _Item, me, step):
        row_tile = it.tile * consumers + me
        queries = tiles.side(machine, refs, "q", 0, it.batch, row_tile, row_tile * ROWS)
        stop, delta = (machine.load(refs["rows"], (it.batch, it.head, n, row_tile), 0) for n in range(2))
        plgpu.barrier_wait(q_full)

        def one_block(n, carry, masked: bool):
            total, step = carry
            slot = lax.rem(step, stages)
            block = refs["order"][it.list_row, it.tile, n]
            keys = tiles.side(machine, refs, "kv", 1, it.batch, block, block * k_block)
            tile = Tile(s, refs, shape, it.batch, it.head, queries, keys)
            plgpu.barrier_wait(full.at[slot])

            def weights(x):
                x, factor, capped = _logits(s, x, tile, masked)
                return tile.marked(jnp.exp2(x * factor - spread(stop, shape, 0))), capped

            mine = lax.optimization_barrier(me)  # addresses made here, not kept in registers around the loop
            first, second = (q_smem.at[mine], k_smem.at[slot]), (o_smem.at[mine], v_smem.at[slot])
            if s.width > 128 and s.softcap is not None:  # no registers for two products and the capped scores
                (p, capped), dp = weights(machine.product(*first)), machine.product(*second)
            else:
                (p, capped), dp = machine.two_products(first, second, weights)
            softcap = s.softcap if mode == "dq" else None
            d_biased, ds = tiles.score_gradient(p, dp, spread(delta, shape, 0), s.rate, capped, softcap)  # fmt: skip
            if mode == "dq":
                [total] = machine.add_products((total,), ((ds.astype(k_smem.dtype), k_smem.at[slot]),))
            elif mode == "row":
                total = total + d_biased.sum(1)
            elif mode == "tile":
                out_ref[it.batch, it.head, row_tile, :, block] = d_biased
            else:
                _add_by_bucket(tile, buckets[0].at[me], d_biased)
            plgpu.barrier_arrive(free.at[slot])
            return total, step + 1

        total: Any = None
        if mode == "dq":
            total = machine.zeros(ROWS, s.width)
        elif mode == "row":
            total = machine.vector(jnp.zeros((ROWS,), jnp.float32))
        elif mode == "table":
            nothing = machine.vector(jnp.zeros((ROWS,), jnp.float32))
            pl.loop(0, buckets[0].shape[1])(lambda r: _put(buckets[0], (me, r), nothing))
        total, step = tiles.over_blocks(s, mask, k_block, it.whole, it.masked, one_block, (total, step))
        plgpu.barrier_arrive(q_free)
        if mode == "dq":
            out_ref[it.batch, row_tile, :, it.head] = (total * s.scale).astype(out_ref.dtype)
        elif mode == "row":
            out_ref[it.batch, it.head, row_tile] = total
        elif mode == "table":

            @pl.loop(0, buckets[0].shape[1])
            def _write(r):
                out_ref[it.batch, it.head, row_tile, r] = machine.load(buckets[0], (me, r), 0)

        return step

    _divide_labour(consumers, items, min(items, s.ctas), make_item, copy, compute, drained)


def _put(ref, index, value) -> None:
    ref[index] = value


def _add_by_bucket(tile: Tile, sums, ds) -> None:
    """Adds a tile's gradients to the sums by bucket and query, (R', 64) in shared memory."""

    @pl.loop(*tile.span())
    def _bucket(r):
        sums[r] = tile.settings.machine.load(sums, (r,), 0) + jnp.where(tile.inside(r), ds, 0.0).sum(1)


# --- dk and dv --------------------------------------------------------------------------------------------------------


def _dkv_kernel(s: Settings, mode: str, names, items: int, k_tiles: int, mask: Mask, inputs, outputs, scratch):
    """Mode "dkv" gives dk and dv, "column" the gradient of the scores summed over queries.

    With a key block of 128 each warpgroup has 64 keys; with one of 64, where both gradients of so wide a head would
    not fit in its registers, both have the same keys, and one of them sums dv and the other dk.
    """
    refs = dict(zip(names, inputs))
    k_smem, v_smem, q_smem, o_smem, row_smem, k_full, k_free, full, free = scratch
    q_block, k_block, stages = dataclasses.astuple(s.dkv)
    machine, shape, own = s.machine, (ROWS, q_block), k_block // ROWS
    group = 1 if mode == "column" else s.group
    heads = s.heads // group

    def make_item(number):
        return _item(refs["counts"], s.batch, heads, k_tiles, False, number)

    def copy(it: _Item, i, step):
        pl.when(i > 0)(lambda: plgpu.barrier_wait(k_free))
        key_head = lax.div(it.head, s.group // group)
        for c in range(own):
            rows = pl.ds(it.tile * k_block + c * ROWS, ROWS)
            for name, smem in (("k", k_smem), ("v", v_smem)):
                plgpu.copy_gmem_to_smem(refs[name].at[it.batch, rows, key_head], smem.at[c], k_full)

        def one_head(g, step):
            head = it.head * group + g

            def one_block(n, step):
                slot = lax.rem(step, stages)
                rows = pl.ds(refs["order"][it.list_row, it.tile, n] * q_block, q_block)
                pl.when(step >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
                for name, smem in (("q", q_smem), ("dout", o_smem)):
                    plgpu.copy_gmem_to_smem(refs[name].at[it.batch, rows, head], smem.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(refs["rows"].at[it.batch, head, :, rows], row_smem.at[slot], full.at[slot])
                return step + 1

            return lax.fori_loop(it.whole[0], it.masked[1], one_block, step)

        return lax.fori_loop(0, group, one_head, step)

    def drained(step):
        tiles.drain(step, stages, [free])
        plgpu.barrier_wait(k_free)

    def compute_part(it: _Item, me, part, step, parts: str):
        """Sums the gradients named in `parts`, "k" and "v", of the 64 keys of `part`, or "c" for mode "column"."""
        row_tile = it.tile * own + part
        keys = tiles.side(machine, refs, "kv", 0, it.batch, row_tile, row_tile * ROWS)
        plgpu.barrier_wait(k_full)

        def one_block(n, carry, masked: bool, head):
            sums, step = carry
            sums = dict(sums)
            slot = lax.rem(step, stages)
            block = refs["order"][it.list_row, it.tile, n]
            queries = tiles.side(machine, refs, "q", 1, it.batch, block, block * q_block)
            tile = Tile(s, refs, shape, it.batch, head, queries, keys)
            plgpu.barrier_wait(full.at[slot])

            def weights(x):
                x, factor, capped = _logits(s, x, tile, masked)
                stop = machine.load(row_smem, (slot, 0), 1)
                return tile.marked(jnp.exp2(x * factor - spread(stop, shape, 1))), capped

            mine = lax.optimization_barrier(part)  # addresses made here, not kept in registers around the loop
            first, second = (k_smem.at[mine], q_smem.at[slot]), (v_smem.at[mine], o_smem.at[slot])
            if parts == "v":
                (p, capped), dp = weights(machine.product(*first)), None
            else:
                (p, capped), dp = machine.two_products(first, second, weights)
            factors = {}
            if "v" in parts:
                dropped = jnp.where(tiles.survives(p), p, 0.0) if s.rate > 0 else p
                factors["v"] = dropped.astype(k_smem.dtype), o_smem.at[slot]
            if dp is not None:
                delta = spread(machine.load(row_smem, (slot, 1), 1), shape, 1)
                softcap = s.softcap if mode == "dkv" else None
                d_biased, ds = tiles.score_gradient(p, dp, delta, s.rate, capped, softcap)
                factors["k"] = ds.astype(k_smem.dtype), q_smem.at[slot]
                if mode == "column":
                    sums["c"] = sums["c"] + d_biased.sum(1)
            if mode != "column":
                summed = machine.add_products(tuple(sums[x] for x in parts), tuple(factors[x] for x in parts))
                sums = dict(zip(parts, summed))
            plgpu.barrier_arrive(free.at[slot])
            return sums, step + 1

        def one_head(g, carry):
            step_of = functools.partial(one_block, head=it.head * group + g)
            return tiles.over_blocks(s, mask, k_block, it.whole, it.masked, step_of, carry)

        nothing = {name: machine.zeros(ROWS, s.width) for name in parts if name in "kv"}
        if mode == "column":
            nothing = {"c": machine.vector(jnp.zeros((ROWS,), jnp.float32))}
        sums, step = lax.fori_loop(0, group, one_head, (nothing, step)) if group > 1 else one_head(0, (nothing, step))
        plgpu.barrier_arrive(k_free)
        if mode == "column":
            outputs[0][it.batch, it.head, row_tile] = sums["c"]
            return step
        for name, ref, factor in (("k", outputs[0], s.scale), ("v", outputs[1], 1 / (1 - s.rate))):
            if name in sums:
                ref[it.batch, row_tile, :, it.head] = (sums[name] * factor).astype(ref.dtype)
        return step

    def compute(it: _Item, me, step):
        first = jnp.int32(0)
        if mode == "column":
            # Where both have the same keys they write the same sums.
            return compute_part(it, me, me if own > 1 else first, step, "c")
        if own > 1:
            return compute_part(it, me, me, step, "kv")
        one, other = (functools.partial(compute_part, it, me, first, parts=parts) for parts in "vk")
        return lax.cond(me == 0, one, other, step)

    _divide_labour(CONSUMERS, items, min(items, s.ctas), make_item, copy, compute, drained)
