"""Tiles of scores in the Mosaic GPU kernels: their mathematics, their masks and biases, and the lists of blocks.

A tile has 64 rows, those of one warpgroup, and as many columns as a block in shared memory. In the forward and the dq
pass rows are queries and columns keys; in the dk and dv pass it is the other way round. Logits are kept in base 2.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith

from llm.attention import blocks, dropout
from llm.attention.bias import BucketBias
from llm.attention.block_sizes import Blocks
from llm.attention.mask import Mask, rule
from llm.attention.pallas_versions import Machine, spread

ROWS = 64
LOG2E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The static part of a call.

    Attributes:
        batch, queries, keys, heads, group: B, T, S, N and G = N // K.
        width: of a head, padded to 64, 128 or 256.
        scale, softcap, rate: as in `attention`; rate is that of dropout.
        mask: its static fields.
        forward, dq, dkv, decode: block sizes.
        ctas: blocks of threads at a time, one a multiprocessor.
        interpret: parameters of the interpreter, None on a device.
        splits: parts into which the keys of a query are cut, each with an output of its own.
        fold: queries T where a tile's rows are (G, T) of one key head, else 0.
    """

    batch: int
    queries: int
    keys: int
    heads: int
    group: int
    width: int
    scale: float
    softcap: float | None
    rate: float
    mask: Mask
    forward: Blocks
    dq: Blocks
    dkv: Blocks
    decode: Blocks
    ctas: int
    interpret: Any = None
    splits: int = 1
    fold: int = 0

    @property
    def machine(self) -> Machine:
        return Machine(self.interpret is not None)


# --- the mathematics of one tile --------------------------------------------------------------------------------------


def finish(products, scale: float, softcap: float | None, add_bias=None):
    """Scores from products of queries and keys: (x, factor, capped), where x * factor are the logits in base 2.

    `capped` are the scores under the soft cap and without the bias, None where there is no cap; `add_bias` adds it.
    """
    if softcap is None and add_bias is None and scale > 0:
        return products, scale * LOG2E, None  # one fused multiply-add a score, inside the exponential
    x, capped = products * scale, None
    if softcap is not None:
        # tanh from a quotient of exponentials: the device's approximate one is off by 5e-4.
        x = capped = softcap * (1 - 2 / (1 + jnp.exp2(x * (2 * LOG2E / softcap))))
    return (x if add_bias is None else add_bias(x)), LOG2E, capped


def weigh(x, factor: float, top, total, across):
    """One step of the running softmax over rows: (weights, factor on what came before, top, total), in base 2.

    `across` spreads a value a row over the tile.
    """
    new_top = jnp.maximum(top, x.max(1) * factor)
    # Until a row has seen a key its maximum is -inf; 0 in its place keeps -inf minus -inf out of the exponentials.
    base = jnp.where(new_top == -jnp.inf, 0.0, new_top)
    p = jnp.exp2(x * factor - across(base))
    shrink = jnp.exp2(top - base)
    return p, shrink, new_top, total * shrink + p.sum(1)


def score_gradient(p, dp, delta, rate: float, capped=None, softcap: float | None = None):
    """(gradient of the biased scores, gradient of the products before the scale); delta is spread over the tile.

    Where there is dropout, p is marked.
    """
    if rate > 0:
        dp = jnp.where(survives(p), dp * (1 / (1 - rate)), 0.0)
    ds = p * (dp - delta)
    if softcap is None or capped is None:
        return ds, ds
    slope = capped * (1 / softcap)
    return ds, ds * (1 - slope * slope)


def mark(machine: Machine, p, words, rate: float, batch, head, q_position, kv_position):
    """Weights whose lowest bit, 2**-24 of them, says whether they survive dropout, as `dropout.keep` decides it.

    A decision kept by itself would take a register for every weight. Positions are tiles, the others scalars.
    """
    scalars = words[0], words[1], batch.astype(jnp.uint32) + words[2], head.astype(jnp.uint32) + words[3]
    scalars = [lax.broadcast_in_dim(x, p.shape, ()) for x in scalars]
    plain, registers = functools.partial(_mark, rate), functools.partial(_mark_registers, round(rate * 2**32))
    return machine.each(plain, registers, p, q_position.astype(jnp.uint32), kv_position.astype(jnp.uint32), *scalars)


def survives(marked):
    """What `mark` decided."""
    return (lax.bitcast_convert_type(marked, jnp.int32) & 1) != 0


def _mark(rate: float, p, q, k, key0, key1, batch, head):
    word = dropout.chosen_word((key0, key1, jnp.uint32(0), jnp.uint32(0)), batch, head, q, k.astype(jnp.int32))
    kept = dropout.survives(word, rate).astype(jnp.int32)
    return lax.bitcast_convert_type(lax.bitcast_convert_type(p, jnp.int32) & ~1 | kept, jnp.float32)


def _mark_registers(threshold: int, p, q, k, key0, key1, batch, head):
    """`_mark` of MLIR values, with the 64-bit products that the device has."""

    def constant(x: int):
        value = ir.IntegerAttr.get(ir.IntegerType.get_signless(32), x - 2**32 if x >= 2**31 else x)
        if isinstance(q.type, ir.VectorType):
            value = ir.DenseElementsAttr.get_splat(q.type, value)
        return arith.constant(q.type, value)

    def equal(x, y: int):
        return arith.cmpi(arith.CmpIPredicate.eq, x, constant(y))

    x0, x1, x2, x3 = batch, head, q, arith.shrsi(k, constant(2))
    for n in range(10):
        low0, high0 = arith.mului_extended(x0, constant(dropout._MULTIPLIERS[0]))
        low1, high1 = arith.mului_extended(x2, constant(dropout._MULTIPLIERS[1]))
        keys = [arith.addi(key, constant(weyl * n % 2**32)) for key, weyl in zip((key0, key1), dropout._WEYL)]
        x0, x1 = arith.xori(arith.xori(high1, x1), keys[0]), low1
        x2, x3 = arith.xori(arith.xori(high0, x3), keys[1]), low0
    lane = arith.andi(k, constant(3))
    bits = arith.select(equal(lane, 2), x2, x3)
    bits = arith.select(equal(lane, 0), x0, arith.select(equal(lane, 1), x1, bits))
    kept = arith.cmpi(arith.CmpIPredicate.uge, bits, constant(threshold))
    unmarked = arith.andi(arith.bitcast(q.type, p), constant(2**32 - 2))
    return arith.bitcast(p.type, arith.select(kept, arith.ori(unmarked, constant(1)), unmarked))


# --- operands ---------------------------------------------------------------------------------------------------------


def split(x: jax.Array, axis: int, block: int, size: int, **how) -> jax.Array:
    """An axis padded to whole blocks and cut into (blocks, size). An axis of 1 stays, followed by another of 1."""
    if x.shape[axis] == 1:
        return jnp.expand_dims(x, axis + 1)
    x = blocks.pad(x, axis, block, **how)
    return x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])


def operands(s: Settings, mask: Mask, bias, words, q_block: int, k_block: int, turned: bool) -> dict[str, jax.Array]:
    """The arrays beside q, k and v that a kernel reads, by name, cut into the rows and columns of tiles.

    Vectors become (B or 1, tiles, size); a dense mask and a bias (B, N, row tiles, 64, column tiles, columns), any pair
    of the last four 1, with keys as rows if `turned`. What a call does not have is not there.
    """
    q_size, k_size = (q_block, ROWS) if turned else (ROWS, k_block)
    given = {}
    for name, x, block, size in (
        ("q_positions", mask.q_positions_BT, q_block, q_size),
        ("kv_positions", mask.kv_positions_BS, k_block, k_size),
        ("q_segments", mask.q_segments_BT, q_block, q_size),
        ("kv_segments", mask.kv_segments_BS, k_block, k_size),
    ):
        if x is not None:
            x = blocks.pad(x.astype(jnp.int32), 1, block, mode="edge")
            given[name] = x.reshape(x.shape[0], -1, size)
    for name, x in (("lengths", mask.kv_lengths_B), ("prefixes", mask.prefix_lengths_B)):
        if x is not None:
            given[name] = jnp.clip(x, 0, jnp.iinfo(jnp.int32).max).astype(jnp.int32)
    for name, x in (
        ("dense", None if mask.dense_BNTS is None else mask.dense_BNTS.astype(jnp.int8)),
        ("bias", None if isinstance(bias, BucketBias) else bias),
    ):
        if x is not None:
            x = split(split(x, 3, k_block, k_size), 2, q_block, q_size)
            given[name] = x.transpose(0, 1, 4, 5, 2, 3) if turned else x
    if s.rate > 0:
        given["words"] = words
    return given


def column_positions(s: Settings, given: dict, mask: Mask, q_block: int, k_block: int, turned: bool) -> dict:
    """Positions of the columns of tiles as an operand, where they are not `given`.

    Computed in place they would be the same in every tile; the compiler keeps them in registers, and spills others.
    """
    name, at, size = ("q_positions", 0, q_block) if turned else ("kv_positions", 1, k_block)
    if name in given:
        return {}
    positions = blocks.pad(mask.positions(s.queries, s.keys)[at], 1, size, mode="edge")
    return {name: positions.reshape(1, -1, size)}


def buckets(bias: BucketBias) -> tuple[np.ndarray, np.ndarray]:
    """(order, intervals): the buckets that are used, by the relative positions they stand for, (R',) and (R', 2)."""
    intervals = bias.intervals()
    order = np.argsort(intervals[:, 0], kind="stable")
    order = order[intervals[order, 0] <= intervals[order, 1]]
    return order, intervals[order]


def spans(intervals: np.ndarray, g: blocks.Geometry) -> jax.Array:
    """First bucket and one past the last that a tile meets: int32 (rows or 1, q tiles, k tiles, 2)."""
    low = g.k_positions.min(-1)[None] - g.q_positions.max(-1)[:, None]
    high = g.k_positions.max(-1)[None] - g.q_positions.min(-1)[:, None]
    first = (low[..., None] > intervals[:, 1]).sum(-1)
    last = (high[..., None] >= intervals[:, 0]).sum(-1)
    return jnp.moveaxis(jnp.stack([first, last], -1), 2, 0).astype(jnp.int32)


def table(s: Settings, bias: BucketBias, mask: Mask, q_block: int, k_block: int, turned: bool) -> dict[str, jax.Array]:
    """The operands of a bucket bias: the table by head and used bucket, the buckets' edges, and where they are met."""
    order, intervals = buckets(bias)
    q_size, k_size = (q_block, min(ROWS, k_block)) if turned else (min(ROWS, q_block), k_block)
    met = spans(intervals, blocks.geometry(plan(s, q_size, k_size), mask))
    # Tiles that fill up the last block have no queries or keys of their own.
    met = blocks.pad(blocks.pad(met, 1, q_block // q_size), 2, k_block // k_size)
    return {"table": bias.table_RN.astype(jnp.float32)[order].T, "edges": jnp.asarray(intervals), "spans": met}


def plan(s: Settings, q_block: int, k_block: int) -> blocks.Plan:
    return blocks.Plan(
        s.batch, s.queries, s.keys, s.heads // s.group, s.group, s.batch, s.heads // s.group, q_block, k_block
    )


def lists(s: Settings, mask: Mask, q_block: int, k_block: int, turned: bool) -> tuple[jax.Array, jax.Array]:
    """Which blocks meet: (order, counts) for every query block, or for every key block if `turned`.

    order, (rows or 1, blocks, others), lists first the others with which everything is visible, then those to mask;
    counts, (rows or 1, blocks, 2), is how many come before the mask is needed, and in all.
    """
    p = plan(s, q_block, k_block)
    without_dense = dataclasses.replace(mask, dense_BNTS=None)  # it says nothing of blocks
    g = blocks.geometry(p, without_dense, known=True)
    xp: Any = blocks.array_module(g.q_positions)
    some, every = xp.broadcast_arrays(blocks.needed(p, g), blocks.whole(p, g))
    every = every & (mask.dense_BNTS is None)
    rank = xp.where(some, xp.where(every, 0, 1), 2).transpose((2, 1, 0) if turned else (2, 0, 1))
    counts = xp.stack([(rank == 0).sum(-1), (rank < 2).sum(-1)], -1)
    order = xp.argsort(rank, axis=-1, stable=True)
    return jnp.asarray(order.astype(jnp.int32)), jnp.asarray(counts.astype(jnp.int32))


# --- what hides and what is added in a tile ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Side:
    """The queries or the keys of a tile: the axis they lie on, the index of the first, and what is known of each."""

    axis: int
    first: jax.Array
    block: jax.Array
    positions: jax.Array | None
    segments: jax.Array | None


def side(machine: Machine, refs: dict, who: str, axis: int, batch, block, first) -> Side:
    """Loads what is known of one block of queries ("q") or keys ("kv")."""

    def vector(name):
        ref = refs.get(f"{who}_{name}")
        return None if ref is None else machine.load(ref, (batch if ref.shape[0] > 1 else 0, block), axis)

    return Side(axis, first, block, vector("positions"), vector("segments"))


@dataclasses.dataclass(frozen=True)
class Tile:
    """One tile: who its queries and keys are, and where a kernel finds the rest."""

    settings: Settings
    refs: dict
    shape: tuple[int, int]
    batch: jax.Array
    head: jax.Array
    q: Side
    k: Side

    def positions(self, who: Side):
        """Positions of the queries or keys at every place of the tile."""
        if who.positions is not None:
            return spread(who.positions, self.shape, who.axis)
        shift = self.settings.keys - self.settings.queries if who is self.q else 0
        return self.settings.machine.index(self.shape, who.axis) + (who.first + shift)

    def add_bias(self, x):
        """Scores with the bias."""
        s = self.settings
        if "bias" in self.refs:
            return x + self._picked("bias").astype(jnp.float32)
        table = self.refs["table"]

        def body(r, x):
            if s.fold:
                value = spread(s.machine.load(table, (self.head, r), 0), self.shape, 0)
            else:
                value = table[self.head, r]
            return jnp.where(self.inside(r), x + value, x)

        first, end = self.span()
        return lax.fori_loop(first, end, body, x)

    def has_bias(self) -> bool:
        return "bias" in self.refs or "table" in self.refs

    def span(self) -> tuple:
        """The first of the buckets that the tile meets, and one past the last."""
        spans_ = self.refs["spans"]
        at = self.batch if spans_.shape[0] > 1 else 0, self.q.block, self.k.block
        return spans_[(*at, 0)], spans_[(*at, 1)]

    def inside(self, r):
        """Where the relative position is in bucket r."""
        # Sums of two rows' or columns' values: the differences of all would be kept in registers around a loop.
        q, k, edges = self.positions(self.q), self.positions(self.k), self.refs["edges"]
        return (k >= q + edges[r, 0]) & (k <= q + edges[r, 1])

    def seen(self):
        """What is visible, None if everything is."""
        s, refs = self.settings, self.refs
        q, k = self.positions(self.q), self.positions(self.k)
        segments = [None if x.segments is None else spread(x.segments, self.shape, x.axis) for x in (self.q, self.k)]
        scalars = [refs[name][self.batch] if name in refs else None for name in ("lengths", "prefixes")]
        conditions = [rule(s.mask, q, k, *segments, *scalars)]
        block = self.shape[self.k.axis]
        if s.keys % block:
            conditions.append(s.machine.index(self.shape, self.k.axis) + self.k.first < s.keys)
        if "dense" in refs:
            conditions.append(self._picked("dense").astype(jnp.int32) != 0)
        conditions = [x for x in conditions if x is not None]
        return functools.reduce(jnp.logical_and, conditions) if conditions else None

    def marked(self, p):
        """Weights marked by dropout's decision, or as they are where there is none."""
        if "words" not in self.refs:
            return p
        words = [self.refs["words"][i] for i in range(4)]
        positions = self.positions(self.q), self.positions(self.k)
        return mark(self.settings.machine, p, words, self.settings.rate, self.batch, self.head, *positions)

    def _picked(self, name: str):
        """This tile of an array of (B, N, row blocks, rows, column blocks, columns), any pair of which may be 1."""
        ref, machine = self.refs[name], self.settings.machine
        rows, columns = (self.q, self.k) if self.q.axis == 0 else (self.k, self.q)
        batch = self.batch if ref.shape[0] > 1 else 0
        head = self.head if ref.shape[1] > 1 else 0
        # Only an axis of 1 has blocks of 1.
        by_row, by_column = ref.shape[3] > 1, ref.shape[5] > 1
        row = (rows.block, slice(None)) if by_row else (0, 0)
        column = (columns.block, slice(None)) if by_column else (0, 0)
        index = batch, head, *row, *column
        if by_row and by_column:
            return machine.load(ref, index)
        if by_row or by_column:
            axis = 0 if by_row else 1
            return spread(machine.load(ref, index, axis), self.shape, axis)
        return ref[index]


def drain(step, stages: int, barriers) -> None:
    """Waits until everything that was put into a ring of `stages` in `step` steps has been used."""
    for n in range(stages):
        at = step + n

        @pl.when(at >= stages)
        def _wait(at=at):
            for free in barriers:
                plgpu.barrier_wait(free.at[lax.rem(at, stages)])


def over_blocks(s: Settings, mask: Mask, k_block: int, whole: tuple, masked: tuple, one_block: Callable, carry):
    """one_block(n, carry, masked) over the blocks, (first, one past the last), that are whole, then those to mask.

    No code is made for what cannot be needed.
    """
    if mask.dense_BNTS is None:
        carry = lax.fori_loop(whole[0], whole[1], functools.partial(one_block, masked=False), carry)
    static = mask.causal or (mask.window or (None, None)) != (None, None)
    if static or jax.tree.leaves(mask) or s.keys % k_block:
        carry = lax.fori_loop(masked[0], masked[1], functools.partial(one_block, masked=True), carry)
    return carry
