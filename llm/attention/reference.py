"""Attention as its definition reads, with the whole matrix of scores in float32."""

import jax
import jax.numpy as jnp

from llm.attention import dropout
from llm.attention.bias import BucketBias
from llm.attention.mask import Mask, visible
from llm.attention.passes import Passes, differentiated


def attention_weights(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    *,
    mask: Mask = Mask(),
    bias: jax.Array | BucketBias | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks_N: jax.Array | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> jax.Array:
    """The softmax weights of `attention` before dropout: float32 of shape (B, N, T, S).

    Rows sum to one, to less where `sinks_N` take a share, and to zero where a query sees nothing.
    """
    return _weights_and_lse(q_BTNH, k_BSKH, mask, bias, scale, softcap, sinks_N, precision)[0]


def _weights_and_lse(q_BTNH, k_BSKH, mask, bias, scale, softcap, sinks_N, precision):
    B, T, N, H = q_BTNH.shape
    _, S, K, _ = k_BSKH.shape
    if precision is None:
        precision = jax.lax.Precision.HIGHEST
    scale = H**-0.5 if scale is None else scale
    q_BTKGH = q_BTNH.astype(jnp.float32).reshape(B, T, K, N // K, H)
    s_BNTS = (
        jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH.astype(jnp.float32), precision=precision).reshape(B, N, T, S)
        * scale
    )
    if softcap is not None:
        s_BNTS = softcap * jnp.tanh(s_BNTS / softcap)
    q_positions, kv_positions = mask.positions(T, S)
    if isinstance(bias, BucketBias):
        s_BNTS += bias.at(q_positions, kv_positions)
    elif bias is not None:
        s_BNTS += bias.astype(jnp.float32)
    seen = visible(mask, q_positions, kv_positions, mask.q_segments_BT, mask.kv_segments_BS)[:, None]
    if mask.dense_BNTS is not None:
        seen = seen & mask.dense_BNTS
    seen = jnp.broadcast_to(seen, s_BNTS.shape)

    s_BNTS = jnp.where(seen, s_BNTS, -jnp.inf)
    top = jnp.max(s_BNTS, axis=-1, keepdims=True, initial=-jnp.inf)
    if sinks_N is not None:
        sinks = sinks_N.astype(jnp.float32)[None, :, None, None]
        top = jnp.maximum(top, sinks)
    # A row that sees nothing has no maximum; 0 keeps its exponentials, and so its gradients, at exactly zero.
    top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0.0))
    p_BNTS = jnp.where(seen, jnp.exp(jnp.where(seen, s_BNTS, 0.0) - top), 0.0)
    total = jnp.sum(p_BNTS, axis=-1, keepdims=True)
    if sinks_N is not None:
        total += jnp.exp(sinks - top)
    empty = total == 0
    total = jnp.where(empty, 1.0, total)
    lse_BNT = jnp.where(empty, -jnp.inf, top + jnp.log(total))[..., 0]
    return p_BNTS / total, lse_BNT


def reference(
    q_BTNH, k_BSKH, v_BSKH, *, mask, bias, scale, softcap, sinks_N, dropout_rate, dropout_words, precision
) -> tuple[jax.Array, jax.Array]:
    """Attention by its definition. Returns out_BTNH in the dtype of q and the log-sum-exp lse_BTN in float32."""
    B, T, N, _ = q_BTNH.shape
    _, S, K, H = v_BSKH.shape
    p_BNTS, lse_BNT = _weights_and_lse(q_BTNH, k_BSKH, mask, bias, scale, softcap, sinks_N, precision)
    if dropout_rate > 0:
        q_positions, kv_positions = mask.positions(T, S)
        kept = dropout.keep(
            dropout_words,
            dropout_rate,
            jnp.arange(B)[:, None, None, None],
            jnp.arange(N)[None, :, None, None],
            q_positions[:, None, :, None],
            kv_positions[:, None, None, :],
        )
        p_BNTS = jnp.where(kept, p_BNTS / (1 - dropout_rate), 0.0)
    if precision is None:
        precision = jax.lax.Precision.HIGHEST
    out = jnp.einsum(
        "BKGTS,BSKH->BTKGH", p_BNTS.reshape(B, K, N // K, T, S), v_BSKH.astype(jnp.float32), precision=precision
    )
    return out.reshape(B, T, N, H).astype(q_BTNH.dtype), jnp.moveaxis(lse_BNT, 1, 2)


def passes(q_BTNH, k_BSKH, v_BSKH, *, bias, **how) -> Passes:
    """The passes of `reference`, by its derivative."""

    def call(q_BTNH, k_BSKH, v_BSKH, bias):
        return reference(q_BTNH.astype(jnp.float32), k_BSKH, v_BSKH, bias=bias, sinks_N=None, **how)

    return differentiated(call, q_BTNH, k_BSKH, v_BSKH, bias)
