"""What the TPU kernels share: the list of pairs of blocks, their operands, and the scores of one tile.

Keys first: a tile is (keys, queries), a value a query is a row (1, queries), a value a key a column (keys, 1).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from llm.attention import blocks, dropout
from llm.attention.bias import BucketBias
from llm.attention.blocks import Plan
from llm.attention.mask import Mask, rule

LANES = 128
# What a kernel may take of the on-chip memory: below the smallest of the generations (64 MiB a core on 7x).
VMEM_BYTES = 48 * 2**20

# An entry of the list of pairs: query block << 18 | key block << 4 | these.
FIRST, LAST, MASKED, WORK = 1, 2, 4, 8


@dataclasses.dataclass(frozen=True)
class Call:
    """The static part of a call: plans of both passes, and how Pallas runs them."""

    forward: Plan
    backward: Plan
    interpret: Any

    def compiler_params(self, free: int, grid: int = 3):
        """`free` leading axes of the grid may go to different cores; the steps along the others follow each other."""
        semantics: Any = ("parallel",) * free + ("arbitrary",) * (grid - free)
        return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=VMEM_BYTES)


def tall(n: int, unit: int) -> int:
    """n rounded up to a multiple of unit."""
    return -(-n // unit) * unit


def wide(x_BTNH: jax.Array, block: int) -> jax.Array:
    """(B, T, N, H) -> (B, T', N H'): T in whole blocks, H in whole registers, no transposition."""
    x = blocks.pad(blocks.pad(x_BTNH, 1, block), 3, LANES)
    return x.reshape(*x.shape[:2], -1)


def key_head(plan: Plan, n):
    """The key head of query head n. No floor division: it would ask for the sign, and that for a TPU at hand."""
    return n if plan.group == 1 else jax.lax.div(n, plan.group)


def rows_of(x_BN1T: jax.Array) -> jax.Array:
    """(B, N, 1, T) -> (B, T, N)."""
    return x_BN1T[:, :, 0].transpose(0, 2, 1)


def flip(x: jax.Array) -> jax.Array:
    """The transposed tile, also of a row, a column or a single number, of 32-bit values."""
    if x.shape == (1, 1):
        return x
    if x.shape[0] == 1:
        return jnp.broadcast_to(x, (8, x.shape[1])).T[:, :1]
    if x.shape[1] == 1:
        return jnp.broadcast_to(x, (x.shape[0], LANES)).T[:1]
    return x.T


def list_length(plan: Plan, mask: Mask) -> int:
    """How many entries the list of `pairs` takes, of all rows."""
    if not jax.tree.leaves(mask):
        return int(pairs(plan, mask, "q")[1])
    rows = plan.batch if jax.tree.leaves(dataclasses.replace(mask, dense_BNTS=None)) else 1
    return rows * plan.q_blocks * plan.k_blocks


def pairs(plan: Plan, mask: Mask, major: str, every: bool = False, union: bool = False):
    """The pairs of blocks a kernel visits, int32 of shape (rows or 1, P), and the number of steps, at most P.

    Entries are in the order of query blocks ("q") or key blocks ("k") first; each such block has at least one entry,
    the first and the last are marked. Past the end the last entry is repeated without a mark: it costs no copy.
    `every` lists pairs without work too; with `union` one list serves all batch rows.
    """
    entries, counts = _pairs(plan, mask, major, every, union)
    if isinstance(entries, np.ndarray):
        # Known while tracing: the list is a constant and the grid has a fixed size.
        return jnp.asarray(entries[:, : counts.max()]), int(counts.max())
    return entries, jnp.max(counts)


def _pairs(plan: Plan, mask: Mask, major: str, every: bool, union: bool):
    g = blocks.geometry(plan, mask, known=True)
    xp: Any = blocks.array_module(g.q_positions)
    work, whole = xp.broadcast_arrays(blocks.needed(plan, g), blocks.whole(plan, g))
    if union:
        work, whole = work.any(-1, keepdims=True), whole.all(-1, keepdims=True)
    i, j = np.arange(plan.q_blocks, dtype=np.int32)[:, None, None], np.arange(plan.k_blocks, dtype=np.int32)[:, None]
    along = 1 if major == "q" else 0  # the axis that an outer block's entries run along
    inner = j if major == "q" else i
    listed = xp.ones_like(work) if every else work | (~work.any(along, keepdims=True) & (inner == 0))
    seen_before = xp.cumsum(listed, along)
    first = listed & (seen_before == 1)
    last = listed & (seen_before == seen_before.max(along, keepdims=True))
    entry = i << 18 | j << 4 | FIRST * first | LAST * last | MASKED * ~whole | WORK * work
    if major == "k":
        entry, listed = entry.transpose(1, 0, 2), listed.transpose(1, 0, 2)
    entry, listed = (x.reshape(-1, x.shape[2]).T for x in (entry, listed))
    counts = listed.sum(-1)
    order = xp.argsort(~listed, axis=-1, stable=True)
    entry = xp.take_along_axis(entry, order, -1)
    end = xp.take_along_axis(entry, counts[:, None] - 1, -1)
    entries = xp.where(xp.arange(entry.shape[1]) < counts[:, None], entry, end & ~15)
    return entries.astype(jnp.int32), counts


@dataclasses.dataclass
class Where:
    """Where a grid step works: batch row, query head, query block, key block."""

    b: Any
    n: Any
    i: Any
    j: Any


@dataclasses.dataclass
class Operands:
    """The arrays of a kernel call under their names: the prefetched ones first, then those with blocks."""

    at: Callable  # grid indices -> (batch row, query head, number in the list of pairs)
    grid: int
    prefetch: dict[str, jax.Array]
    steps: Any
    blocked: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    specs: list = dataclasses.field(default_factory=list)
    scratch: dict = dataclasses.field(default_factory=dict)

    def where(self, f: Callable) -> Callable:
        """An index map out of a function of `Where`."""
        rows = self.prefetch["pairs"].shape[0]

        def index(*args):
            b, n, p = self.at(*args[: self.grid])
            entry = args[self.grid][b if rows > 1 else 0, p]
            return f(Where(b, n, entry >> 18, (entry >> 4) & 0x3FFF))

        return index

    def add(self, name: str, x: jax.Array, block, f: Callable) -> None:
        self.blocked[name] = x
        self.specs.append(pl.BlockSpec(block, self.where(f)))

    @property
    def prefetched(self) -> int:
        return len(self.prefetch)

    @property
    def inputs(self) -> int:
        return len(self.prefetch) + len(self.blocked)

    @property
    def arrays(self) -> list:
        return [*self.prefetch.values(), *self.blocked.values()]

    def named(self, refs) -> dict:
        # Scratch that these operands need comes last of all.
        names = [*self.prefetch, *self.blocked]
        return dict(zip(names, refs)) | dict(zip(reversed(self.scratch), reversed(refs)))


def operands(plan: Plan, mask: Mask, bias, words, *, major: str, at: Callable, grid: int = 3, **how) -> Operands:
    """What every kernel needs to score a tile, apart from q and k."""
    listed, count = pairs(plan, mask, major, **how)
    prefetch = {"pairs": listed}
    if mask.kv_lengths_B is not None:
        prefetch["lengths"] = mask.kv_lengths_B.astype(jnp.int32)
    if mask.prefix_lengths_B is not None:
        prefetch["prefixes"] = mask.prefix_lengths_B.astype(jnp.int32)
    if plan.dropout_rate > 0:
        prefetch["words"] = jax.lax.bitcast_convert_type(words, jnp.int32)
    given = Operands(at, grid, prefetch, count)
    if isinstance(bias, BucketBias):
        prefetch["table"] = bias.table_RN.astype(jnp.float32).reshape(-1)
        prefetch["intervals"] = jnp.asarray(bias.intervals().reshape(-1))
        given.scratch["bias"] = pltpu.VMEM((plan.k_block, plan.q_block), jnp.float32)
    if plan.dropout_rate > 0:
        # Stores to every fourth row need a last axis of one register.
        lanes = LANES if plan.q_block % LANES == 0 else plan.q_block
        given.scratch["kept"] = pltpu.VMEM((plan.q_block // lanes, plan.k_block, lanes), jnp.int32)

    def per_position(name, x, block, of_query):
        x = blocks.pad(x.astype(jnp.int32)[:, None], 2, block, mode="edge" if "positions" in name else "constant")
        given.add(name, x, (None, 1, block), lambda w: (w.b, 0, w.i if of_query else w.j))

    if mask.q_positions_BT is not None:
        per_position("q_positions", mask.q_positions_BT, plan.q_block, True)
    if mask.kv_positions_BS is not None:
        per_position("kv_positions", mask.kv_positions_BS, plan.k_block, False)
    if mask.q_segments_BT is not None and mask.kv_segments_BS is not None:
        per_position("q_segments", mask.q_segments_BT, plan.q_block, True)
        per_position("kv_segments", mask.kv_segments_BS, plan.k_block, False)
    if mask.dense_BNTS is not None:
        add_scores(plan, given, "dense", mask.dense_BNTS.astype(jnp.int8))
    if bias is not None and not isinstance(bias, BucketBias):
        add_scores(plan, given, "array", bias)
    return given


def add_scores(plan: Plan, given: Operands, name: str, x: jax.Array) -> None:
    """An operand of shape (B or 1, N or 1, T or 1, S or 1)."""
    x = blocks.pad_scores(plan, x)
    given.add(name, x, *scores_block(plan, x.shape))


def scores_block(plan: Plan, shape) -> tuple[tuple, Callable]:
    """Block and index function of an array padded from (B or 1, N or 1, T or 1, S or 1)."""
    b, n, t, s = (size > 1 for size in shape)
    block = (None, None, plan.q_block if t else 1, plan.k_block if s else 1)
    return block, lambda w: (w.b if b else 0, w.n if n else 0, w.i if t else 0, w.j if s else 0)


class Tile:
    """One grid step inside a kernel."""

    def __init__(self, plan: Plan, mask: Mask, bias, refs: dict, b, n, p):
        self.plan, self.mask, self.bias, self.refs, self.b, self.n = plan, mask, bias, refs, b, n
        entry = refs["pairs"][b if refs["pairs"].shape[0] > 1 else 0, p]
        self.i, self.j = entry >> 18, (entry >> 4) & 0x3FFF
        self.first, self.last, self.masked, self.works = ((entry & flag) != 0 for flag in (FIRST, LAST, MASKED, WORK))

    def product(self, a: jax.Array, b: jax.Array, over: tuple[int, int]) -> jax.Array:
        """A product over one axis of each, summed in float32."""
        return jax.lax.dot_general(
            a, b, (((over[0],), (over[1],)), ((), ())),
            precision=self.plan.precision, preferred_element_type=jnp.float32,
        )  # fmt: skip

    def q_positions(self) -> jax.Array:
        plan = self.plan
        if "q_positions" in self.refs:
            return self.refs["q_positions"][...]
        start = plan.keys - plan.queries + self.i * plan.q_block
        return start + jax.lax.broadcasted_iota(jnp.int32, (1, plan.q_block), 1)

    def kv_index(self) -> jax.Array:
        return self.j * self.plan.k_block + jax.lax.broadcasted_iota(jnp.int32, (self.plan.k_block, 1), 0)

    def kv_positions(self) -> jax.Array:
        return flip(self.refs["kv_positions"][...]) if "kv_positions" in self.refs else self.kv_index()

    def seen(self) -> jax.Array | None:
        """Bool that broadcasts to the tile, or None: everything."""
        refs, segments = self.refs, (None, None)
        if "q_segments" in refs:
            segments = refs["q_segments"][...], flip(refs["kv_segments"][...])
        length, prefix = (refs[name][self.b] if name in refs else None for name in ("lengths", "prefixes"))
        conditions = [rule(self.mask, self.q_positions(), self.kv_positions(), *segments, length, prefix)]
        if self.plan.keys % self.plan.k_block:
            conditions.append(self.kv_index() < self.plan.keys)
        if "dense" in refs:
            conditions.append(flip(refs["dense"][...].astype(jnp.int32)) != 0)
        conditions = [x for x in conditions if x is not None]
        return functools.reduce(jnp.logical_and, conditions) if conditions else None

    def added(self) -> jax.Array | None:
        """The bias, float32 that broadcasts to the tile."""
        if "array" in self.refs:
            return flip(self.refs["array"][...].astype(jnp.float32))
        return self.look_up() if isinstance(self.bias, BucketBias) else None

    def each_bucket(self, body: Callable) -> None:
        """Runs body(bucket, where in the tile it is, a bool) for the buckets of which the tile has positions."""
        q, k = self.q_positions(), self.kv_positions()
        if "q_positions" in self.refs or "kv_positions" in self.refs:
            nearest, farthest = jnp.min(k) - jnp.max(q), jnp.max(k) - jnp.min(q)
        else:
            start = self.j * self.plan.k_block - self.i * self.plan.q_block - self.plan.keys + self.plan.queries
            nearest, farthest = start - self.plan.q_block + 1, start + self.plan.k_block - 1
        intervals = self.refs["intervals"]

        def one(r, _):
            low, high = intervals[2 * r], intervals[2 * r + 1]

            @pl.when((low <= high) & (low <= farthest) & (high >= nearest))
            def _():
                body(r, (k - q >= low) & (k - q <= high))

        jax.lax.fori_loop(0, self.bias.table_RN.shape[0], one, None)

    def look_up(self) -> jax.Array:
        out, heads = self.refs["bias"], self.bias.table_RN.shape[1]

        def body(r, inside):
            out[...] = jnp.where(inside, self.refs["table"][r * heads + self.n], out[...])

        self.each_bucket(body)
        return out[...]

    def scores(self, masked: bool) -> tuple[jax.Array, jax.Array]:
        """(scores, -inf where hidden; the soft-capped ones before the bias), float32 of (keys, queries)."""
        products = self.product(self.refs["k"][...], self.refs["q"][...], (1, 1))
        seen = self.seen() if masked else None
        return blocks.finish_scores(self.plan, products, self.added(), seen)

    def kept(self) -> jax.Array:
        """Dropout's decisions, bool, made chunk by chunk: Philox on a whole tile would be a very long program."""
        words = [jax.lax.bitcast_convert_type(self.refs["words"][n], jnp.uint32) for n in range(4)]
        plan, out, q = self.plan, self.refs["kept"], self.q_positions()
        chunk = next(size for size in (LANES, 8, 4, 1) if plan.k_block % size == 0)
        four_at_once = "kv_positions" not in self.refs and chunk >= 4

        def store(rows, word):
            survives = dropout.survives(word, plan.dropout_rate).astype(jnp.int32)
            for column, lanes in enumerate(jnp.split(survives, out.shape[0], 1)):
                out.at[column][rows, :] = lanes

        def one(c, _):
            if four_at_once:
                # A counter serves four keys in a row.
                first = self.j * (plan.k_block // 4) + c * (chunk // 4)
                counter = first + jax.lax.broadcasted_iota(jnp.int32, (chunk // 4, 1), 0)
                for lane, word in enumerate(dropout.bits(words, self.b, self.n, q, counter)):
                    store(pl.ds(c * chunk + lane, chunk // 4, 4), word)
                return
            here = pl.ds(c * chunk, chunk)
            if "kv_positions" in self.refs:
                k = flip(self.refs["kv_positions"][:, here])
            else:
                k = self.j * plan.k_block + c * chunk + jax.lax.broadcasted_iota(jnp.int32, (chunk, 1), 0)
            store(here, dropout.chosen_word(words, self.b, self.n, q, k))

        jax.lax.fori_loop(0, plan.k_block // chunk, one, None)
        return jnp.concatenate([out[column] for column in range(out.shape[0])], 1) != 0


def steps(tile: Tile, step: Callable[[bool], None]) -> None:
    """Runs step(masked) if the pair has work, without the mask where everything is visible."""
    pl.when(tile.works & tile.masked)(lambda: step(True))
    pl.when(tile.works & ~tile.masked)(lambda: step(False))
