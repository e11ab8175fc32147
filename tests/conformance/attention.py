"""The conformance table of attention: cases that every implementation must get right, and the judge.

Truth is the float64 oracle. The yardstick of its error is attention written plainly in XLA, with every product of
factors in the case's dtype: an implementation may be at most twice as far from the truth, in the output and in every
gradient.
"""

import contextlib
import dataclasses
import functools
import importlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from llm.attention import IMPLEMENTATIONS, BucketBias, Mask, attention, pallas_versions
from llm.attention.api import why_not_here
from llm.attention.block_sizes import Blocks, using
from llm.attention.dropout import key_words
from llm.attention.target import compiling_for
from tests.attention import oracle
from tests.quick import optimized, quick

blockwise, mosaic_tpu_backward = (
    importlib.import_module(f"llm.attention.{name}") for name in ("blockwise", "mosaic_tpu_backward")
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table. `mask` makes the mask from (rng, case); `bias` is a shape, or "table"."""

    B: int = 2
    T: int = 11
    S: int = 19
    N: int = 6
    K: int = 3
    H: int = 5
    Hv: int = 7
    mask: Callable = lambda rng, c: Mask()
    bias: tuple[int, ...] | str | None = None
    sinks: bool = False  # the first one is -inf, which is none
    softcap: float | None = None
    scale: float | None = None
    rate: float = 0.0
    dtype: str = "float32"
    lse: bool = True


# --- the parts of a mask ----------------------------------------------------------------------------------------------


def _mask(*parts, **static) -> Callable:
    """A maker of masks from parts, functions of (rng, case) that give fields, and static fields."""

    def make(rng, c):
        fields = dict(static)
        for part in parts:
            fields |= part(rng, c)
        return Mask(**fields)

    return make


def _documents(rng, c):
    """Documents in order, some rows with padding (0) at the end; queries are the last T tokens of the keys' rows."""
    ids = np.sort(rng.integers(1, 4, (c.B, max(c.T, c.S))), axis=1)
    ids[:, rng.integers(max(c.T, c.S) // 2, max(c.T, c.S)) :] *= rng.integers(0, 2, (c.B, 1))
    return {"q_segments_BT": jnp.asarray(ids[:, -c.T :]), "kv_segments_BS": jnp.asarray(ids[:, -c.S :])}


def _restarted(rng, c):
    """Documents whose positions restart at 0, as packed batches have them; T = S."""
    fields = _documents(rng, c)
    ids = np.asarray(fields["kv_segments_BS"])
    starts = np.concatenate([np.ones((c.B, 1), bool), ids[:, 1:] != ids[:, :-1]], axis=1)
    index = np.arange(c.S)
    at = jnp.asarray(index - np.maximum.accumulate(np.where(starts, index, 0), axis=1))
    return fields | {"q_positions_BT": at, "kv_positions_BS": at}


def _cache(rng, c):
    """A cache filled to another length in every row, its last T keys being the queries."""
    lengths = rng.integers(c.T, c.S + 1, c.B)
    lengths[0] = c.S
    q_positions = lengths[:, None] - c.T + np.arange(c.T)
    return {"kv_lengths_B": jnp.asarray(lengths), "q_positions_BT": jnp.asarray(q_positions)}


def _lengths(rng, c):
    """Lengths from nothing to everything."""
    lengths = rng.integers(0, c.S + 1, c.B)
    lengths[0], lengths[-1] = 0, c.S
    return {"kv_lengths_B": jnp.asarray(lengths)}


def _some_length(rng, c):
    return {"kv_lengths_B": jnp.asarray(rng.integers(1, c.S + 1, c.B), jnp.int32)}


def _prefix(rng, c):
    return {"prefix_lengths_B": jnp.asarray(rng.integers(0, c.S, c.B))}


def _shuffled(rng, c):
    """Positions in no order: a shard of a sequence dealt out for balance."""
    return {
        "q_positions_BT": jnp.asarray(rng.integers(0, c.S, (c.B, c.T))),
        "kv_positions_BS": jnp.asarray(np.stack([rng.permutation(c.S) for _ in range(c.B)])),
    }


def _dense(rng, c):
    """A rule of its own for every row and head, some queries seeing nothing."""
    dense = rng.random((c.B, c.N, c.T, c.S)) > 0.4
    dense[0, :, 0] = False
    return {"dense_BNTS": jnp.asarray(dense)}


def _dense_of_all_heads(rng, c):
    return {"dense_BNTS": jnp.asarray(rng.random((1, 1, c.T, c.S)) > 0.4)}


# --- the table --------------------------------------------------------------------------------------------------------

CASES: dict[str, Case] = {
    "full": Case(),
    "causal": Case(mask=_mask(causal=True)),
    "window": Case(mask=_mask(window=(3, 2))),
    "causal window": Case(mask=_mask(causal=True, window=(4, None))),
    "lengths": Case(mask=_mask(_lengths)),
    "prefix": Case(mask=_mask(_prefix, causal=True)),
    "packing": Case(mask=_mask(_documents)),
    "positions": Case(mask=_mask(_shuffled, causal=True)),
    "dense": Case(mask=_mask(_dense)),
    "soft cap, scale": Case(softcap=2.0, scale=0.7),
    "sinks": Case(sinks=True),
    "dropout": Case(rate=0.3),
    "bias": Case(bias=(2, 6, 11, 19)),
    "bucket bias": Case(bias="table"),
    # crossings
    "packing, one key head": Case(mask=_mask(_documents, causal=True), K=1),
    "packing, groups, soft cap": Case(mask=_mask(_documents, causal=True), N=12, K=4, softcap=3.0),
    "packing, restarted, window": Case(B=3, T=19, mask=_mask(_restarted, causal=True, window=(3, None)), N=8, K=4),
    "packing, restarted, bucket bias": Case(T=19, mask=_mask(_restarted), bias="table"),
    "packing, dropout, sinks": Case(mask=_mask(_documents, causal=True), rate=0.4, sinks=True),
    "packing, encoder and decoder": Case(T=23, S=17, mask=_mask(_documents)),
    "window, fewer queries": Case(T=4, S=29, mask=_mask(causal=True, window=(5, None))),
    "window, more queries": Case(T=29, S=13, mask=_mask(window=(6, 2))),
    "window ahead, lengths": Case(mask=_mask(_lengths, window=(None, 3))),
    "causal, more queries, sinks": Case(T=23, S=13, mask=_mask(causal=True), sinks=True),
    "causal, more queries, bias": Case(T=23, S=13, mask=_mask(causal=True), bias=(1, 6, 23, 13)),
    "bias of all rows, dropout": Case(bias=(1, 6, 11, 19), rate=0.3, mask=_mask(causal=True)),
    "bias of rows, dropout, groups": Case(bias=(2, 1, 11, 19), rate=0.2, N=8, K=4, mask=_mask(_lengths)),
    "bias of keys, dropout": Case(bias=(2, 1, 1, 19), rate=0.5),
    "bias of queries, soft cap": Case(bias=(1, 6, 11, 1), softcap=2.0),
    "bias of heads, dense": Case(bias=(1, 6, 1, 1), mask=_mask(_dense_of_all_heads)),
    "bucket bias, window, sinks": Case(bias="table", mask=_mask(causal=True, window=(6, None)), sinks=True),
    "bucket bias, shuffled, dropout": Case(bias="table", mask=_mask(_shuffled), rate=0.3, N=8, K=4),
    "prefix, cache": Case(T=7, S=29, mask=_mask(_cache, _prefix, causal=True)),
    "prefix, cache, window": Case(T=9, S=31, mask=_mask(_cache, _prefix, causal=True, window=(8, None)), N=8, K=4),
    "prefix, packing": Case(T=19, mask=_mask(_documents, _prefix, causal=True)),
    "dense, dropout, soft cap": Case(mask=_mask(_dense, causal=True), rate=0.3, softcap=2.0),
    "shuffled, dropout": Case(mask=_mask(_shuffled, causal=True), rate=0.3),
    "no keys seen": Case(mask=lambda rng, c: Mask(kv_lengths_B=jnp.zeros(c.B, jnp.int32)), sinks=False, rate=0.2),
    "no keys seen but sinks": Case(mask=lambda rng, c: Mask(kv_lengths_B=jnp.zeros(c.B, jnp.int32)), sinks=True),
    "everything": Case(
        N=12, K=4, mask=_mask(_documents, _lengths, _prefix, _dense, causal=True, window=(7, None)),
        bias=(2, 12, 11, 19), sinks=True, softcap=3.0, scale=0.4, rate=0.3,
    ),
    "everything with buckets": Case(
        B=3, T=9, S=23, N=8, K=4, mask=_mask(_shuffled, _documents, _prefix, causal=True, window=(9, 4)),
        bias="table", sinks=True, softcap=3.0, rate=0.3,
    ),
    "parts of two rows": Case(
        B=4, T=5, N=6, K=2, H=8, mask=_mask(_documents, _lengths, _prefix, _dense, causal=True, window=(7, None)),
        bias=(4, 6, 5, 19), sinks=True, rate=0.3,
    ),
    "parts of one head": Case(N=24, K=3, mask=_mask(_dense), bias=(1, 24, 11, 19), rate=0.2),
    "parts of four heads": Case(B=3, N=16, K=8, mask=_mask(_cache, _dense, causal=True), bias="table", rate=0.3),
    "parts of heads, bias of heads": Case(B=3, N=12, K=4, bias=(1, 12, 11, 1), sinks=True),
    "no keys": Case(S=0),
    "no keys but sinks": Case(S=0, sinks=True),
    # a query or a few against a cache
    "decode": Case(B=3, T=1, S=37, N=12, K=4, H=8, Hv=6, mask=_mask(_cache, causal=True)),
    "decode, one key head, window": Case(
        B=3, T=2, S=37, N=5, K=1, H=8, mask=_mask(_cache, causal=True, window=(9, None))
    ),
    "decode, all features": Case(
        B=5, T=3, S=41, N=12, K=4, H=8, mask=_mask(_cache, _prefix, _dense, causal=True, window=(9, None)),
        bias=(5, 12, 3, 41), sinks=True, softcap=2.0, scale=0.3,
    ),
    "decode, packing, bucket bias": Case(B=3, T=4, S=41, N=2, K=1, H=8, mask=_mask(_documents, _cache), bias="table"),
    "decode, bias of keys": Case(B=3, T=1, S=37, N=4, K=2, H=8, mask=_mask(_lengths), bias=(1, 1, 1, 37), sinks=True),
    "decode, bfloat16": Case(B=3, T=2, S=70, N=8, K=4, H=16, mask=_mask(_cache, causal=True), dtype="bfloat16"),
    # more than one block of the sizes used in earnest
    "long": Case(B=2, T=531, S=600, N=6, K=3, H=16, Hv=8, mask=_mask(_documents, causal=True)),
    "long, window": Case(B=1, T=700, S=530, N=4, K=2, H=8, Hv=16, mask=_mask(window=(40, 7)), sinks=True, rate=0.2),
    "long decode": Case(B=2, T=4, S=2500, N=12, K=6, H=64, Hv=32, mask=_mask(_cache, causal=True)),
    "long decode, one query": Case(B=4, T=1, S=2048, N=12, K=3, H=64, Hv=32, mask=_mask(_lengths)),
    # widths and half precision
    "wide": Case(T=64, S=65, H=192, Hv=128, mask=_mask(causal=True)),
    "width of one": Case(B=3, H=1, Hv=1, N=4, K=2, mask=_mask(causal=True)),
    "bfloat16": Case(mask=_mask(causal=True), dtype="bfloat16", H=16, Hv=16, lse=False),
    "bfloat16, packing, groups, soft cap": Case(
        mask=_mask(_documents, causal=True), dtype="bfloat16", N=12, K=4, H=16, softcap=3.0, sinks=True
    ),
    "bfloat16, bias, dropout": Case(bias=(1, 6, 11, 19), rate=0.3, dtype="bfloat16", H=16),
    "float16": Case(mask=_mask(causal=True), dtype="float16", H=16, Hv=16),
    "float16, bucket bias, window": Case(bias="table", mask=_mask(window=(5, 5)), dtype="float16", H=16),
    # what cuDNN has too
    "bfloat16 over all keys": Case(T=12, S=20, H=16, Hv=16, dtype="bfloat16", lse=False),
    "bfloat16 self-attention": Case(
        T=20, S=20, N=8, K=4, H=16, Hv=16, mask=_mask(causal=True), dtype="bfloat16", lse=False
    ),
    "float16 self-attention in a window": Case(
        T=20, S=20, H=16, Hv=16, mask=_mask(causal=True, window=(5, None)), dtype="float16", lse=False
    ),
    "bfloat16, lengths from zero": Case(
        T=12, S=20, H=16, Hv=16, mask=_mask(_lengths), dtype="bfloat16", lse=False, scale=0.3
    ),
    "bfloat16, causal, lengths": Case(
        T=20, S=20, H=16, Hv=16, mask=_mask(_lengths, causal=True), dtype="bfloat16", lse=False
    ),
    "bfloat16, one query": Case(T=1, S=20, H=16, Hv=16, mask=_mask(causal=True), dtype="bfloat16", lse=False),
    "bfloat16, lengths": Case(T=12, S=20, H=16, Hv=16, mask=_mask(_some_length), dtype="bfloat16", lse=False),
    "float16, bias": Case(T=12, S=20, N=8, K=4, H=16, Hv=16, bias=(1, 8, 12, 20), dtype="float16", lse=False),
}  # fmt: skip

# Cases whose features an implementation lacks; a change of coverage is a change of this number.
LACKING = {"reference": 0, "blockwise": 0, "cudnn": 64, "mosaic_gpu": 58, "mosaic_tpu": 4}


# --- implementations --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def replaced(module, **values):
    """Attributes of a module set to other values."""
    before = {name: getattr(module, name) for name in values}
    for name, value in values.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def small_blocks():
    """Blocks and parts of blockwise so small that every case has many of them."""
    return replaced(blockwise, BLOCK=8, SCORES=512, SCORES_ON_CPU=512, DECODE_BLOCK=16)


def tpu_interpreted():
    """The TPU kernels in Pallas's interpreter."""
    return compiling_for("tpu", "interpreter", interpret=True)


@contextlib.contextmanager
def tpu_in_small_blocks():
    """The same with blocks of 8, and a backward pass that keeps no more than two blocks of keys on the chip."""
    two_blocks = 2 * 8 * 4 * (128 + 128)
    with using("mosaic_tpu", forward=Blocks(8, 8), backward=Blocks(8, 8)), tpu_interpreted():
        with replaced(mosaic_tpu_backward, RESIDENT_BYTES=two_blocks):
            yield


@contextlib.contextmanager
def gpu_interpreted():
    """The Hopper kernels on two multiprocessors in the Mosaic GPU interpreter."""
    how = pallas_versions.interpreter()
    with compiling_for("gpu", "interpreter", capability="9.0", cores=2, interpret=how):
        yield


@dataclasses.dataclass(frozen=True)
class Variant:
    """A way to run the table: an implementation, a context, the dtype in place of float32, and how it is compiled."""

    implementation: str
    context: Callable = contextlib.nullcontext
    dtype: str = "float32"
    optimized: bool = False

    def case(self, c: Case) -> Case:
        c = c if c.dtype != "float32" else dataclasses.replace(c, dtype=self.dtype)
        if self.context is gpu_interpreted and (c.B, c.N, c.K) == (2, 6, 3) and not isinstance(c.bias, tuple):
            return dataclasses.replace(c, B=1, N=4, K=2)  # its time is that of the heads of all rows
        return c


VARIANTS: dict[str, Variant] = {name: Variant(name, optimized=name != "reference") for name in IMPLEMENTATIONS} | {
    "blockwise in small blocks": Variant("blockwise", small_blocks),
    "mosaic_tpu interpreted": Variant("mosaic_tpu", tpu_interpreted),
    "mosaic_tpu interpreted in small blocks": Variant("mosaic_tpu", tpu_in_small_blocks),
    # The table once more in the precision of the kernel.
    "mosaic_gpu in bfloat16": Variant("mosaic_gpu", dtype="bfloat16", optimized=True),
    "mosaic_gpu interpreted in bfloat16": Variant("mosaic_gpu", gpu_interpreted, "bfloat16"),
}
# A case takes this interpreter ten seconds and more: one runs always, one with the long tests, the others as slow ones.
GPU_INTERPRETED = {"no keys seen but sinks"}, {"positions"}
# Of two variants every feature alone runs always, the crossings that have broken kernels with the long tests; the other
# crossings, which run always by "blockwise in small blocks" too, as slow ones.
_ALONE = {
    "full", "causal", "causal window", "lengths", "prefix", "packing", "positions", "dense", "soft cap, scale", "sinks",
    "dropout", "bias", "bucket bias",
}  # fmt: skip
_CROSSED = {
    "packing, groups, soft cap", "packing, restarted, window", "window, more queries", "bias of all rows, dropout",
    "bias of keys, dropout", "bucket bias, shuffled, dropout", "prefix, cache, window", "no keys seen but sinks",
    "everything", "everything with buckets", "no keys but sinks", "decode, all features",
    "bfloat16, packing, groups, soft cap", "float16, bucket bias, window",
}  # fmt: skip
SMALL_TPU = _ALONE, _CROSSED
# In one block, the path of blockwise is the same for every feature.
WHOLE = {"full", "packing", "dropout", "decode", "bfloat16", "float16", "no keys", "no keys seen"}, _CROSSED
# Cases of less than a block of the usual size, where the interpreter of the TPU's blocks still shows something that it
# does not show in small ones: widths, and a block that is padding for the most part.
TPU_INTERPRETED = {"full", "everything", "everything with buckets", "wide", "width of one", "no keys seen", "decode"}


def in_reach(c: Case, variant: str) -> bool:
    """Whether a case is for a variant.

    An interpreter takes milliseconds for each of many small blocks: short cases have them small, long ones of the usual
    size, and some both.
    """
    if variant == "mosaic_tpu interpreted":
        return c.S >= 100 or c in (CASES[name] for name in TPU_INTERPRETED)
    return "interpreted in small blocks" not in variant or c.S < 100


def when(name: str, variant: str) -> str:
    """Returns "always", or which tests a case on a variant belongs to, the "long" or the "slow" ones."""
    if CASES[name].S >= 100 and variant != "mosaic_gpu interpreted in bfloat16":
        return "always" if variant.startswith("blockwise") else "long"
    chosen = {
        "reference": (_ALONE | WHOLE[0], CASES),
        "blockwise": WHOLE,
        "mosaic_tpu interpreted": ({"full", "wide"}, CASES),
        "mosaic_tpu interpreted in small blocks": SMALL_TPU,
        "mosaic_gpu interpreted in bfloat16": GPU_INTERPRETED,
    }
    if variant not in chosen or name in chosen[variant][0]:
        return "always"
    return "long" if name in chosen[variant][1] else "slow"


class Lacking(Exception):
    """The implementation says that it does not have a feature of the case."""


class NotHere(Exception):
    """The implementation says that it cannot run on this platform."""


# --- the judge --------------------------------------------------------------------------------------------------------


FRAME = 3


def framed(tree):
    """Every array inside a larger one full of NaN."""
    return jax.tree.map(lambda x: jnp.pad(x, [(0, FRAME)] * x.ndim, constant_values=jnp.nan), tree)


def cut(tree):
    """The arrays out of their frames."""
    return jax.tree.map(lambda x: x[tuple(slice(0, n - FRAME) for n in x.shape)], tree)


def normal(rng, *shape, dtype="float32"):
    return jnp.asarray(rng.normal(size=shape), dtype)


def inputs(c: Case, seed: int = 0):
    """(traced arguments, static arguments, cotangents) of a case."""
    rng = np.random.default_rng(seed)
    q, k, v = normal(rng, c.B, c.T, c.N, c.H), normal(rng, c.B, c.S, c.K, c.H), normal(rng, c.B, c.S, c.K, c.Hv)
    arrays = {name: x.astype(c.dtype) for name, x in (("q", q), ("k", k), ("v", v))}
    if c.bias == "table":
        arrays["bias"] = BucketBias(normal(rng, 8, c.N), bidirectional=True, max_distance=12)
    elif c.bias is not None:
        arrays["bias"] = normal(rng, *c.bias, dtype=c.dtype)
    if c.sinks:
        arrays["sinks_N"] = normal(rng, c.N).at[0].set(-jnp.inf)
    cotangents = normal(rng, c.B, c.T, c.N, c.Hv, dtype=c.dtype), normal(rng, c.B, c.T, c.N)
    return arrays, c.mask(rng, c), cotangents


def expected(c: Case, arrays, mask, cotangents):
    """Output, log-sum-exp and gradients in float64, and the weights' dropout factor."""
    _, q_pos, k_pos = oracle.visible(Mask(**positions_only(mask)), c.B, 1, c.T, c.S)
    bias, collect = arrays.get("bias"), None
    if isinstance(bias, BucketBias):
        bias, collect = oracle.bucket_bias(
            np.asarray(bias.table_RN), q_pos, k_pos, bidirectional=True, buckets=8, max_distance=12
        )
    words = np.asarray(key_words(KEY)) if c.rate else None
    want = oracle.attention(
        arrays["q"], arrays["k"], arrays["v"], mask, bias=None if bias is None else np.float64(bias),
        scale=c.scale, softcap=c.softcap, sinks=arrays.get("sinks_N"), rate=c.rate, words=words,
    )  # fmt: skip
    finite = np.isfinite(want["lse"])
    dlse = np.where(finite, np.float64(cotangents[1]), 0.0) if c.lse else None
    gradients = want["gradients"](np.float64(cotangents[0]), dlse)
    if collect is not None:
        gradients["dbias"] = collect(gradients["dbias"])
    truth = {"out": want["out"], **gradients}
    if c.lse:
        truth["lse"] = want["lse"]
    return truth, bias


def positions_only(mask: Mask) -> dict:
    return {"q_positions_BT": mask.q_positions_BT, "kv_positions_BS": mask.kv_positions_BS}


KEY = jax.random.key(7)


def with_gradients(function, arrays, cotangents, lse: bool, times: int = 1, jit=quick) -> list[dict]:
    """{"out", "lse", "dq", ...} of a function of the arrays, jitted as one, of each of several runs of the program.

    The program gets its arrays inside larger ones full of NaN and cuts them out: a read past the end may meet the NaN.
    """

    @jit
    def run(arrays, cotangents):
        arrays, cotangents = cut((arrays, cotangents))
        if not lse:
            out, pull = jax.vjp(function, arrays)
            return {"out": out}, pull(cotangents[0])[0]
        (out, lse_BTN), pull = jax.vjp(function, arrays)
        dlse = jnp.where(jnp.isfinite(lse_BTN), cotangents[1], 0.0)
        return {"out": out, "lse": lse_BTN}, pull((cotangents[0], dlse))[0]

    names = {"q": "dq", "k": "dk", "v": "dv", "bias": "dbias", "sinks_N": "dsinks"}
    results = []
    for _ in range(times):
        values, gradients = jax.device_get(run(framed(arrays), framed(cotangents)))
        gradients = {names[name]: x.table_RN if isinstance(x, BucketBias) else x for name, x in gradients.items()}
        results.append({**values, **gradients})
    return results


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gradient_in_dtype(x, dtype):
    """x, whose gradient is rounded to the dtype.

    In half precision the gradient of the scores is a factor of products as the weights are, and units for products
    take factors of one dtype; XLA by itself would keep that one in float32.
    """
    return x


gradient_in_dtype.defvjp(lambda x, dtype: (x, None), lambda dtype, _, g: (g.astype(dtype).astype(jnp.float32),))


def plain(c: Case, arrays, mask, cotangents, bias):
    """Attention as one would write it in XLA: products in the dtype, softmax in float32. Visibility is the oracle's."""
    seen = jnp.asarray(oracle.visible(mask, c.B, c.N, c.T, c.S)[0])
    factor = 1.0
    if c.rate:
        # The oracle draws the weights' factors: what it gives for equal scores, over the softmax of equal scores.
        ones = jnp.zeros((c.B, c.T, c.N, 1)), jnp.zeros((c.B, c.S, c.N, 1))
        drawn = oracle.attention(
            *ones, np.broadcast_to(np.eye(c.S)[None, :, None], (c.B, c.S, c.N, c.S)), Mask(**positions_only(mask)),
            rate=c.rate, words=np.asarray(key_words(KEY)),
        )["out"]  # fmt: skip
        factor = jnp.asarray(np.moveaxis(drawn, 2, 1) * c.S, jnp.float32)

    def f(arrays):
        group = c.N // c.K
        k, v = (jnp.repeat(arrays[name], group, axis=2) for name in "kv")
        s = jnp.einsum("btnh,bsnh->bnts", arrays["q"], k, preferred_element_type=jnp.float32)
        s = gradient_in_dtype(s, c.dtype)
        s = s * (c.H**-0.5 if c.scale is None else c.scale)
        if c.softcap is not None:
            s = c.softcap * jnp.tanh(s / c.softcap)
        if "bias" in arrays:
            s = s + (arrays["bias"].astype(jnp.float32) if c.bias != "table" else look_up(arrays["bias"]))
        s = jnp.where(seen, s, -jnp.inf)
        if c.sinks:
            s = jnp.concatenate([s, jnp.broadcast_to(arrays["sinks_N"][:, None, None], (c.B, c.N, c.T, 1))], -1)
        any_seen = (s > -jnp.inf).any(-1, keepdims=True)
        s = jnp.where(any_seen, s, 0.0)
        p = jnp.where(any_seen, jax.nn.softmax(s), 0.0)[..., : c.S] * factor
        out = jnp.einsum("bnts,bsnh->btnh", p.astype(v.dtype), v)
        if not c.lse:
            return out
        lse = jnp.where(any_seen[..., 0], jax.nn.logsumexp(s, -1), -jnp.inf)
        return out, jnp.moveaxis(lse, 1, 2)

    def look_up(bias: BucketBias):
        _, q_pos, k_pos = oracle.visible(Mask(**positions_only(mask)), c.B, 1, c.T, c.S)
        find = np.vectorize(lambda r: oracle.bucket(int(r), bidirectional=True, buckets=8, max_distance=12))
        return jnp.moveaxis(bias.table_RN[find(k_pos[:, None, :] - q_pos[:, :, None])], -1, 1)

    return with_gradients(f, arrays, cotangents, c.lse)[0]


@functools.lru_cache(maxsize=256)
def truth_and_yardstick(c: Case, seed: int):
    """What a case should give, and what plain XLA gives; several variants are judged by them."""
    arrays, mask, cotangents = inputs(c, seed)
    truth, bias = expected(c, arrays, mask, cotangents)
    return truth, plain(c, arrays, mask, cotangents, bias)


def judge(c: Case, variant: str, seed: int = 0) -> None:
    """Runs a case twice on an implementation.

    Raises:
        AssertionError: a number further from the truth than it may be, or another the second time.
        Lacking, NotHere: the implementation raised NotImplementedError, and nothing else, for the case.
    """
    how = VARIANTS[variant]
    c = how.case(c)
    arrays, mask, cotangents = inputs(c, seed)

    def f(arrays):
        given = {n: x for n, x in arrays.items() if n not in "qkv"}
        return attention(
            arrays["q"], arrays["k"], arrays["v"], mask=mask, scale=c.scale, softcap=c.softcap, dropout_rate=c.rate,
            dropout_key=KEY if c.rate else None, implementation=how.implementation, return_lse=c.lse, **given,
        )  # fmt: skip

    with how.context(), optimized() if how.optimized else contextlib.nullcontext():
        try:
            jit = jax.jit if how.optimized else quick
            got, again = with_gradients(f, arrays, cotangents, c.lse, times=2, jit=jit)
        except NotImplementedError as error:
            assert type(error) is NotImplementedError, error
            why = why_not_here(how.implementation)
            raise (NotHere if why is not None and why in str(error) else Lacking)(str(error)) from None
    truth, yardstick = truth_and_yardstick(c, seed)
    assert got.keys() == truth.keys() == yardstick.keys()
    for what, want in truth.items():
        np.testing.assert_array_equal(np.float32(got[what]), np.float32(again[what]), err_msg=f"{what} twice")
        have, other = np.float64(got[what]), np.float64(yardstick[what])
        assert have.shape == want.shape, (what, have.shape, want.shape)
        infinite = np.isinf(want)
        np.testing.assert_array_equal(have[infinite], want[infinite], err_msg=what)
        size = np.abs(want[~infinite]).max(initial=1.0)
        error, allowed = (np.abs(x - want)[~infinite].max(initial=0.0) for x in (have, other))
        # Four float32 roundings of the largest number, where the yardstick happens to be exact.
        allowed = 2 * allowed + 4 * float(np.finfo(np.float32).eps) * size
        assert error <= allowed, f"{what}: off by {error:.3g}, allowed {allowed:.3g}"
