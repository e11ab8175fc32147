"""The two passes of a call apart, for attention over keys that are met a part at a time."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Gradients = tuple[jax.Array, jax.Array, jax.Array, Any]


class Passes(NamedTuple):
    """A call over a part of the keys, its passes apart: `backward` is that of the whole, in which this part is a share.

    Attributes:
        forward: () -> (out_BTNH, lse_BTN) of the part, float32.
        backward: (out_BTNH, lse_BTN, dout_BTNH, dlse_BTN) -> (dq, dk, dv, dbias), where out_BTNH in float32 and lse_BTN
            are those over all keys, and sinks if there are any, dout_BTNH and dlse_BTN their cotangents. dk and dv are
            those of the part's keys; dq and dbias are the part's share. None of them depends on the other parts in any
            other way (Dao et al. 2022, appendix B).
    """

    forward: Callable[[], tuple[jax.Array, jax.Array]]
    backward: Callable[[jax.Array, jax.Array, jax.Array, jax.Array], Gradients]


def differentiated(call: Callable[..., tuple[jax.Array, jax.Array]], *arrays: Any) -> Passes:
    """The passes of a function of (q, k, v, bias) that gives float32 (out_BTNH, lse_BTN) and can be differentiated."""

    def backward(out_BTNH, lse_BTN, dout_BTNH, dlse_BTN) -> Gradients:
        (part_BTNH, part_lse_BTN), pull = jax.vjp(call, *arrays)
        seen_BTN = jnp.isfinite(part_lse_BTN)
        # The whole is the mean of the parts' outputs by these shares, its lse the log of the sum of exp(part's lse).
        share_BTN = jnp.exp(jnp.where(seen_BTN, part_lse_BTN, 0.0) - jnp.where(seen_BTN, lse_BTN, jnp.inf))
        dout_BTNH = dout_BTNH.astype(jnp.float32)
        moved_BTN = jnp.sum(dout_BTNH * (part_BTNH - out_BTNH), -1) + jnp.where(seen_BTN, dlse_BTN, 0.0)
        return pull((share_BTN[..., None] * dout_BTNH, share_BTN * moved_BTN))

    return Passes(lambda: call(*arrays), backward)
