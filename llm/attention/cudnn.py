"""cuDNN's fused attention through `jax.nn.dot_product_attention`, for the calls in which it keeps our contract."""

import jax
import jax.numpy as jnp

from llm.attention.bias import BucketBias
from llm.attention.mask import Mask
from llm.attention.target import target


def why_not_here() -> str | None:
    """Why cuDNN cannot run in this process, or None when it can."""
    platform = target().platform
    return None if platform == "gpu" else f"needs an NVIDIA GPU, the platform here is {platform}"


def cudnn(
    q_BTNH, k_BSKH, v_BSKH, *, mask: Mask, bias, scale, softcap, sinks_N, dropout_rate, dropout_words, precision
) -> tuple[jax.Array, None]:
    """Attention by cuDNN. Returns out_BTNH and None: it gives the log-sum-exp in half precision only.

    `precision` is cuDNN's own: half-precision products summed in float32. For calls of which `lacks` says nothing.
    """
    B, T, S = q_BTNH.shape[0], q_BTNH.shape[1], k_BSKH.shape[1]
    lengths = mask.kv_lengths_B
    if lengths is not None:
        lengths = jnp.clip(lengths, 0, S).astype(jnp.int32)
    out_BTNH = jax.nn.dot_product_attention(
        q_BTNH,
        k_BSKH,
        v_BSKH,
        bias=None if bias is None else bias.astype(q_BTNH.dtype),
        scale=scale,
        is_causal=mask.causal and T > 1,
        query_seq_lengths=None if lengths is None else jnp.full((B,), T, jnp.int32),
        key_value_seq_lengths=lengths,
        local_window_size=None if mask.window is None or mask.window[0] is None else (min(mask.window[0], S), 0),
        implementation="cudnn",
    )
    if lengths is not None:
        out_BTNH = jnp.where((lengths > 0)[:, None, None, None], out_BTNH, 0)
    return out_BTNH, None


def lacks(q, k, v, *, mask: Mask, bias, softcap, sinks_N, dropout_rate) -> str | None:
    """The first thing asked for that cuDNN does not have, or does not do as `Mask` says."""
    (B, T, N, H), S, width = q.shape, k.shape[1], v.shape[3]
    windowed = mask.window is not None and mask.window != (None, None)
    reasons = {
        f"takes float16 and bfloat16, q is {q.dtype}": q.dtype not in (jnp.float16, jnp.bfloat16),
        f"needs one dtype, got {q.dtype}, {k.dtype} and {v.dtype}": not q.dtype == k.dtype == v.dtype,
        f"needs a head width of at most 256 that is a multiple of 8, got {H}": H > 256 or H % 8 != 0,
        f"needs values as wide as keys, got {width} and {H}": width != H,
        f"needs at least one query and key, got {T} and {S}": 0 in (B, T, S),
        "has no soft cap": softcap is not None,
        "has no sinks": sinks_N is not None,
        "has no dropout with our counter-based bits": dropout_rate > 0,
        "has no bucket bias": isinstance(bias, BucketBias),
        f"gives a gradient only to a bias of shape (1, {N}, even T, even S)": (
            bias is not None
            and not isinstance(bias, BucketBias)
            and (bias.shape != (1, N, T, S) or T % 2 != 0 or S % 2 != 0)
        ),
        "has no packing by segments": mask.q_segments_BT is not None,
        "has no positions": mask.q_positions_BT is not None or mask.kv_positions_BS is not None,
        "has no prefix": mask.prefix_lengths_B is not None,
        "gives an average, not zero, to a query that a dense mask shows nothing": mask.dense_BNTS is not None,
        "lines up the first query with the first key when causal": mask.causal and T not in (1, S),
        "has a window only when causal, over as many queries as keys, without lengths": (
            windowed and not (mask.causal and T == S > 1 and mask.kv_lengths_B is None)
        ),
    }
    return next((reason for reason, applies in reasons.items() if applies), None)
