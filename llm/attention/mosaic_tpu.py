"""Attention as Pallas kernels for TPU, forward and backward, with every feature of `attention`.

Scores are tiles of (keys, queries): what belongs to a query, the running maximum and sum among it, is then a row over
the lanes, maxima and sums over keys are elementwise over registers, and the log-sum-exp is stored as it lies. A grid
step is one pair of blocks out of a list made beforehand, so that blocks in which nothing is visible cost neither a
step nor a copy (a batch row whose list is shorter than another's has empty steps at its end); a pair in which
everything is visible skips the mask.

Sources: Dao et al. 2022 (FlashAttention); the backward pass is fused: dk and dv of a key head stay on the chip while
the queries of its group go by. The backward kernels are in `mosaic_tpu_backward`, the tile that they share with the
forward one in `mosaic_tpu_tile`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from llm.attention import blocks
from llm.attention import mosaic_tpu_backward as backward
from llm.attention.bias import BucketBias
from llm.attention.block_sizes import Blocks, block_sizes
from llm.attention.blocks import Plan
from llm.attention.fold import DECODE_QUERIES, fold, unfold
from llm.attention.mosaic_tpu_tile import LANES, Call, Tile, key_head, list_length, operands, rows_of, steps, tall, wide
from llm.attention.passes import Passes
from llm.attention.target import target

# The list of pairs lies in scalar memory, 1 MiB on every generation that the tests compile for; this is half of it.
MOST_PAIRS = 2**17


def why_not_here() -> str | None:
    """Why the kernel cannot run on the device compiled for, or None when it can."""
    platform = target().platform
    return None if platform == "tpu" else f"needs a TPU, the platform here is {platform}"


def lacks(q, k, v, *, mask, **asked) -> str | None:
    """What the kernel does not have: it has all that `attention` offers, for the dtypes of a TPU."""
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (jnp.float32, jnp.bfloat16):
        return f"takes float32 or bfloat16 for all of q, k and v, got {q.dtype}, {k.dtype} and {v.dtype}"
    if 0 in (*q.shape, *k.shape):
        return None
    longest = max(list_length(plan, mask) for plan in _plans(q, k, v))
    if longest > MOST_PAIRS:
        return f"has room for a list of {MOST_PAIRS:,} pairs of blocks, these masks and lengths may need {longest:,}"
    return None


def mosaic_tpu(
    q_BTNH, k_BSKH, v_BSKH, *, mask, bias, scale, softcap, sinks_N, dropout_rate, dropout_words, precision
) -> tuple[jax.Array, jax.Array]:
    """Attention by our TPU kernels. Returns out_BTNH in the dtype of q and the log-sum-exp lse_BTN in float32.

    For calls of which `lacks` says nothing. A head width that is no multiple of 128 is padded to one.
    """
    if 0 in (*q_BTNH.shape[:3], k_BSKH.shape[1]):
        return blocks.nothing(q_BTNH, v_BSKH, sinks_N)
    call = _call(q_BTNH, k_BSKH, v_BSKH, scale, softcap=softcap, dropout_rate=dropout_rate, precision=precision)
    return _attend(call, q_BTNH, k_BSKH, v_BSKH, bias, sinks_N, mask, dropout_words)


def passes(q_BTNH, k_BSKH, v_BSKH, *, mask, bias, scale, softcap, dropout_rate, dropout_words, precision) -> Passes:
    """The passes of `mosaic_tpu`; no length is 0."""
    call = _call(q_BTNH, k_BSKH, v_BSKH, scale, softcap=softcap, dropout_rate=dropout_rate, precision=precision)
    arrays = q_BTNH, k_BSKH, v_BSKH, bias

    def backward(out_BTNH, lse_BTN, dout_BTNH, dlse_BTN):
        residuals = *arrays, None, mask, dropout_words, out_BTNH, lse_BTN
        return _attend_backward(call, residuals, (dout_BTNH, dlse_BTN))[:4]

    return Passes(lambda: _forward(call, *arrays, mask, dropout_words, jnp.float32), backward)


def _call(q_BTNH, k_BSKH, v_BSKH, scale: float | None, **settings) -> Call:
    scale = q_BTNH.shape[3] ** -0.5 if scale is None else scale
    return Call(*_plans(q_BTNH, k_BSKH, v_BSKH, scale=scale, **settings), target().interpret)


def _plans(q_BTNH, k_BSKH, v_BSKH, **settings) -> tuple[Plan, Plan]:
    """The plans of the forward and the backward pass."""
    (B, T, N, H), (S, K) = q_BTNH.shape, k_BSKH.shape[1:3]
    whole = Plan(B, T, S, K, N // K, rows=B, heads=K, q_block=T, k_block=S, **settings)
    widest, kind = tall(max(H, v_BSKH.shape[3]), LANES), target().kind
    forward, back = (
        _fitted(whole, block_sizes("mosaic_tpu", which, kind, widest, q_BTNH.dtype))
        for which in ("forward", "backward")
    )
    return forward, back


def _fitted(plan: Plan, sizes: Blocks) -> Plan:
    """The plan with blocks no longer than the call, in whole registers."""
    q_block, k_block = min(sizes.q_block, tall(plan.queries, LANES)), min(sizes.k_block, tall(plan.keys, LANES))
    return dataclasses.replace(plan, q_block=q_block, k_block=k_block)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(call: Call, q_BTNH, k_BSKH, v_BSKH, bias, sinks_N, mask, words):
    dtype = q_BTNH.dtype if sinks_N is None else jnp.float32
    out, lse = _forward(call, q_BTNH, k_BSKH, v_BSKH, bias, mask, words, dtype)
    out, lse = blocks.with_sinks(out, lse, sinks_N)
    return out.astype(q_BTNH.dtype), lse


def _attend_forward(call: Call, q_BTNH, k_BSKH, v_BSKH, bias, sinks_N, mask, words):
    out, lse = _forward(call, q_BTNH, k_BSKH, v_BSKH, bias, mask, words, jnp.float32)
    out, lse = blocks.with_sinks(out, lse, sinks_N)
    return (out.astype(q_BTNH.dtype), lse), (q_BTNH, k_BSKH, v_BSKH, bias, sinks_N, mask, words, out, lse)


def _attend_backward(call: Call, residuals, cotangents):
    q_BTNH, k_BSKH, v_BSKH, bias, sinks_N, mask, words, out, lse = residuals
    dout, dlse = cotangents
    stop, delta = blocks.row_terms(out, lse, dout, dlse)
    dq, dk, dv, dbias = backward.gradients(call, q_BTNH, k_BSKH, v_BSKH, bias, mask, words, dout, stop, delta)
    return dq, dk, dv, dbias, blocks.sinks_gradient(sinks_N, stop, delta), None, None


_attend.defvjp(_attend_forward, _attend_backward)


# --- forward ----------------------------------------------------------------------------------------------------------


def _forward(call: Call, q_BTNH, k_BSKH, v_BSKH, bias, mask, words, dtype) -> tuple[jax.Array, jax.Array]:
    """out_BTNH in `dtype` and lse_BTN, without sinks."""
    plan = call.forward
    B, T = q_BTNH.shape[:2]
    width = v_BSKH.shape[3]
    K, G = plan.key_heads, plan.group
    folds = T <= DECODE_QUERIES and G > 1 and plan.dropout_rate == 0 and not isinstance(bias, BucketBias)
    if folds:
        q_BTNH, bias, mask = fold(plan, q_BTNH, bias, mask)
        plan = _fitted(dataclasses.replace(plan, queries=G * T, group=1), Blocks(tall(G * T, LANES), plan.k_block))
    given = operands(plan, mask, bias, words, major="q", at=lambda b, n, p: (b, n, p))
    q, k, v = (wide(x, block) for x, block in ((q_BTNH, plan.q_block), (k_BSKH, plan.k_block), (v_BSKH, plan.k_block)))
    q_width, v_width = q.shape[2] // q_BTNH.shape[2], v.shape[2] // K
    heads, padded = q_BTNH.shape[2], q.shape[1]
    given.add("q", q, (None, plan.q_block, q_width), lambda w: (w.b, w.i, w.n))
    given.add("k", k, (None, plan.k_block, q_width), lambda w: (w.b, w.j, key_head(plan, w.n)))
    given.add("v", v, (None, plan.k_block, v_width), lambda w: (w.b, w.j, key_head(plan, w.n)))

    def kernel(*refs):
        tile = Tile(plan, mask, bias, given.named(refs), pl.program_id(0), pl.program_id(1), pl.program_id(2))
        out, lse, acc, top, total = refs[given.inputs :][:5]

        @pl.when(tile.first)
        def _():
            acc[...] = jnp.zeros_like(acc)
            top[...] = jnp.full_like(top, -jnp.inf)
            total[...] = jnp.zeros_like(total)

        def step(masked: bool):
            s, _ = tile.scores(masked)
            p, shrink, top[...], total[...] = blocks.weigh(
                s, top[...], total[...], across=lambda x: x, axis=0, keepdims=True
            )
            if plan.dropout_rate > 0:
                p = jnp.where(tile.kept(), p / (1 - plan.dropout_rate), 0.0)
            v_kH = tile.refs["v"][...]
            acc[...] = acc[...] * shrink + tile.product(v_kH, p.astype(v_kH.dtype), (0, 0))

        steps(tile, step)

        @pl.when(tile.last)
        def _():
            values, lse[...] = blocks.normalise(acc[...], top[...], total[...], across=lambda x: x)
            out[...] = values.T.astype(out.dtype)

    where = given.where
    out, lse = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=given.prefetched,
            grid=(B, heads, given.steps),
            in_specs=given.specs,
            out_specs=[
                pl.BlockSpec((None, plan.q_block, v_width), where(lambda w: (w.b, w.i, w.n))),
                pl.BlockSpec((None, None, 1, plan.q_block), where(lambda w: (w.b, w.n, 0, w.i))),
            ],
            scratch_shapes=[
                pltpu.VMEM((v_width, plan.q_block), jnp.float32),
                pltpu.VMEM((1, plan.q_block), jnp.float32),
                pltpu.VMEM((1, plan.q_block), jnp.float32),
                *given.scratch.values(),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((B, padded, heads * v_width), dtype),
            jax.ShapeDtypeStruct((B, heads, 1, padded), jnp.float32),
        ],
        compiler_params=call.compiler_params(free=2),
        interpret=call.interpret,
        name="attention_forward",
    )(*given.arrays)
    out = out.reshape(B, padded, heads, v_width)[:, : plan.queries, :, :width]
    lse = rows_of(lse)[:, : plan.queries]
    if folds:
        out, lse = unfold(call.forward, out, lse)
    return out, lse
