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
    top = jax.lax.stop_gradient(jnp.stack(lses).max(0))
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    shares = [jnp.exp(lse - top) for lse in lses]
    total = sum(shares[1:], shares[0])
    safe = jnp.where(total == 0, 1.0, total)
    out = sum(share[..., None] * out.astype(jnp.float32) for share, out in zip(shares, outs)) / safe[..., None]
    return out.astype(outs[0].dtype), jnp.where(total == 0, -jnp.inf, top + jnp.log(safe))
