"""Partial attention over disjoint keys brought together."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def merge(parts: Sequence[tuple[jax.Array, jax.Array]]) -> tuple[jax.Array, jax.Array]:
    """The attention over all keys from (out_BTNH, lse_BTN) of the same queries over disjoint sets of them.

    Returns out_BTNH in the dtype of the first part and lse_BTN in float32. Gradients pass; of a query that sees
    nothing anywhere they are zero, like its output. Sinks may take part in one of the calls only.
    """
    outs, lses = zip(*parts)
    out, lse = merge_stacked(jnp.stack([out.astype(jnp.float32) for out in outs]), jnp.stack(lses))
    return out.astype(outs[0].dtype), lse


def merge_stacked(out_PBTNH: jax.Array, lse_PBTN: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`merge` of parts that lie along the first axis of float32 arrays; returns out_BTNH and lse_BTN in float32."""
    top = jax.lax.stop_gradient(lse_PBTN.max(0))
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    shares = jnp.exp(lse_PBTN - top)
    total = shares.sum(0)
    safe = jnp.where(total == 0, 1.0, total)
    out_BTNH = (shares[..., None] * out_PBTNH).sum(0) / safe[..., None]
    return out_BTNH, jnp.where(total == 0, -jnp.inf, top + jnp.log(safe))
