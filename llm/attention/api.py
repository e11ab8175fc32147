"""`attention`: the one function, its checks, and the choice of an implementation."""

import functools
import logging
import types
from collections.abc import Callable

import jax
import jax.numpy as jnp

from llm.attention import blockwise, cudnn, dropout, mosaic_gpu, mosaic_tpu, reference
from llm.attention.bias import BucketBias
from llm.attention.mask import Mask
from llm.attention.passes import Passes
from llm.attention.target import target

IMPLEMENTATIONS: dict[str, Callable] = {
    "reference": reference.reference,
    "blockwise": blockwise.blockwise,
    "cudnn": cudnn.cudnn,
    "mosaic_gpu": mosaic_gpu.mosaic_gpu,
    "mosaic_tpu": mosaic_tpu.mosaic_tpu,
}
# Those that do not run everywhere: each module says what it lacks for a call, and why it cannot run here.
PARTIAL: dict[str, types.ModuleType] = {"cudnn": cudnn, "mosaic_gpu": mosaic_gpu, "mosaic_tpu": mosaic_tpu}
WITHOUT_LSE = {"cudnn"}
# Those with a log-sum-exp also have their two passes apart.
PASSES: dict[str, Callable[..., Passes]] = {
    "reference": reference.passes,
    "blockwise": blockwise.passes,
    "mosaic_gpu": mosaic_gpu.passes,
    "mosaic_tpu": mosaic_tpu.passes,
}
# What "auto" tries on each platform, the first that has everything a call asks for; blockwise has.
PREFERRED = {"tpu": ("mosaic_tpu",), "gpu": ("mosaic_gpu", "cudnn")}


def why_not_here(implementation: str) -> str | None:
    """Why an implementation cannot run on the device compiled for, or None when it can."""
    return PARTIAL[implementation].why_not_here() if implementation in PARTIAL else None


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    mask: Mask = Mask(),
    bias: jax.Array | BucketBias | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks_N: jax.Array | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    dropout_offset: tuple[int | jax.Array, int | jax.Array] = (0, 0),
    precision: jax.lax.PrecisionLike = None,
    implementation: str = "auto",
    return_lse: bool = False,
):
    """Scaled dot-product attention, softmax(q k^T * scale) v, for any mask, head grouping and length.

    Query head n uses key head n // (N // K). Scores, maxima and sums are float32 whatever the inputs. All but
    "reference" have reverse-mode derivatives of first order only.

    Args:
        q_BTNH, k_BSKH, v_BSKH: floating queries, keys and values; the head width of v may differ from that of k.
        mask: who may see whom. A query that sees nothing gives exactly zero and passes zero gradient.
        bias: added to the scores after `softcap`: an array whose axes are 1 or those of (B, N, T, S), or a BucketBias.
        scale: factor on the scores, 1/sqrt(H) by default.
        softcap: scores become softcap * tanh(score / softcap).
        sinks_N: one more logit a head, which takes part in the softmax and carries no value.
        dropout_rate, dropout_key: drops weights with this probability and scales the others by 1 / (1 - rate).
        dropout_offset: the batch row and query head that the first of this call are in a larger one of which this is
            a shard: its dropout is then that of the whole.
        precision: of the matrix products; None is the highest for "reference" and the device's default for
            "blockwise" and "mosaic_tpu". "cudnn" and "mosaic_gpu" have one precision only.
        implementation: a key of IMPLEMENTATIONS, or "auto": our kernel for the platform where there is one and it has
            what is asked for, else cuDNN on GPUs, else "blockwise". The choice and its reason are logged once.
        return_lse: also return the log of the softmax's denominator, float32 of shape (B, T, N), -inf where a query
            sees nothing. Partial results over disjoint keys can be merged by it.

    Returns:
        out_BTNH in the dtype of q, or (out_BTNH, lse_BTN).

    Raises:
        ValueError: shapes, dtypes or arguments that do not fit, naming them.
        NotImplementedError: the named implementation lacks a feature that was asked for.

    Source: Vaswani et al. 2017, section 3.2; grouped heads: Ainslie et al. 2023.
    """
    _check(q_BTNH, k_BSKH, v_BSKH, mask, bias, sinks_N, dropout_rate, dropout_key, softcap)
    asked = dict(mask=mask, bias=bias, softcap=softcap, sinks_N=sinks_N, dropout_rate=dropout_rate)
    out_BTNH, lse_BTN = IMPLEMENTATIONS[_chosen(implementation, q_BTNH, k_BSKH, v_BSKH, asked, return_lse)](
        q_BTNH,
        k_BSKH,
        v_BSKH,
        **asked,
        scale=scale,
        dropout_words=_words(dropout_rate, dropout_key, dropout_offset),
        precision=precision,
    )
    return (out_BTNH, lse_BTN) if return_lse else out_BTNH


def attention_passes(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    mask: Mask = Mask(),
    bias: jax.Array | BucketBias | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    dropout_offset: tuple[int | jax.Array, int | jax.Array] = (0, 0),
    precision: jax.lax.PrecisionLike = None,
    implementation: str = "auto",
) -> Passes:
    """The passes of `attention` over a part of the keys, for whoever brings the parts together: a ring of devices.

    Takes and raises what `attention` does; no length is 0. Sinks take part once in the whole, so in no part.
    """
    _check(q_BTNH, k_BSKH, v_BSKH, mask, bias, None, dropout_rate, dropout_key, softcap)
    asked = dict(mask=mask, bias=bias, softcap=softcap, dropout_rate=dropout_rate)
    chosen = _chosen(implementation, q_BTNH, k_BSKH, v_BSKH, asked | {"sinks_N": None}, return_lse=True)
    words = _words(dropout_rate, dropout_key, dropout_offset)
    return PASSES[chosen](q_BTNH, k_BSKH, v_BSKH, **asked, scale=scale, dropout_words=words, precision=precision)


def _words(rate: float, key: jax.Array | None, offset) -> jax.Array | None:
    return None if key is None or rate == 0 else dropout.key_words(key, offset)


def _chosen(implementation: str, q, k, v, asked: dict, return_lse: bool) -> str:
    """The name of the implementation that runs a call, "auto" resolved."""
    if implementation == "auto":
        implementation = _resolve(q, k, v, asked, return_lse)
    elif implementation not in IMPLEMENTATIONS:
        there_are = ", ".join(name + (f" ({why})" if (why := why_not_here(name)) else "") for name in IMPLEMENTATIONS)
        raise ValueError(f"attention: unknown implementation {implementation!r}; there are auto, {there_are}")
    if lacking := _lacks(implementation, q, k, v, asked, return_lse):
        raise NotImplementedError(f"attention: {implementation} {lacking}")
    return implementation


def _lacks(implementation: str, q, k, v, asked: dict, return_lse: bool) -> str | None:
    """The first thing that an implementation does not have or that keeps it from running here."""
    if implementation not in PARTIAL:
        return None
    if return_lse and implementation in WITHOUT_LSE:
        return "gives no log-sum-exp in float32"
    return PARTIAL[implementation].lacks(q, k, v, **asked) or why_not_here(implementation)


def _resolve(q, k, v, asked: dict, return_lse: bool) -> str:
    """The implementation of "auto"."""
    platform, reasons = target().platform, []
    for name in PREFERRED.get(platform, ()):
        lacking = _lacks(name, q, k, v, asked, return_lse)
        if lacking is None:
            _log(name, platform, tuple(reasons))
            return name
        reasons.append(f"{name} {lacking}")
    _log("blockwise", platform, tuple(reasons))
    return "blockwise"


@functools.cache
def _log(name: str, platform: str, reasons: tuple[str, ...]) -> None:
    """Says once, for each choice and reason, what "auto" is."""
    because = f": {'; '.join(reasons)}" if reasons else ""
    logging.getLogger(__name__).info("attention: auto is %s on %s%s", name, platform, because)


def _check(q, k, v, mask, bias, sinks_N, dropout_rate, dropout_key, softcap) -> None:
    shapes = f"q_BTNH {q.shape}, k_BSKH {k.shape}, v_BSKH {v.shape}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"attention: q, k and v must have four axes (batch, length, heads, width), got {shapes}")
    for name, array in (("q", q), ("k", k), ("v", v)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"attention: {name} has dtype {array.dtype}, expected a floating one")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"attention: k and v differ in batch, length or heads: {shapes}")
    if q.shape[0] != k.shape[0]:
        raise ValueError(f"attention: q and k differ in batch: {shapes}")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"attention: q and k differ in head width, {q.shape[3]} and {k.shape[3]}: {shapes}")
    batch, queries, heads, _ = q.shape
    keys, key_heads = k.shape[1:3]
    if key_heads == 0 or heads % key_heads:
        raise ValueError(f"attention: {heads} query heads are not a multiple of {key_heads} key heads: {shapes}")
    mask.check(batch, heads, queries, keys)
    if isinstance(bias, BucketBias):
        if bias.table_RN.ndim != 2 or bias.table_RN.shape[1] != heads:
            raise ValueError(f"attention: bias table has shape {bias.table_RN.shape}, expected (buckets, {heads})")
    elif bias is not None:
        full = (batch, heads, queries, keys)
        if bias.ndim != 4 or any(have not in (1, want) for have, want in zip(bias.shape, full)):
            raise ValueError(f"attention: bias has shape {bias.shape}, expected {full}, where any axis may be 1")
        if not jnp.issubdtype(bias.dtype, jnp.floating):
            raise ValueError(f"attention: bias has dtype {bias.dtype}, expected a floating one (a mask is no bias)")
    if sinks_N is not None and sinks_N.shape != (heads,):
        raise ValueError(f"attention: sinks_N has shape {sinks_N.shape}, expected ({heads},)")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"attention: softcap={softcap} must be above 0, or None for none")
    if not 0 <= dropout_rate < 1:
        raise ValueError(f"attention: dropout_rate={dropout_rate} must be at least 0 and below 1")
    if dropout_rate > 0 and dropout_key is None:
        raise ValueError(f"attention: dropout_rate={dropout_rate} needs a dropout_key")
    if dropout_key is not None and dropout_key.ndim != (
        0 if jnp.issubdtype(dropout_key.dtype, jax.dtypes.prng_key) else 1
    ):
        raise ValueError(f"attention: dropout_key has shape {dropout_key.shape}, expected a single key")
