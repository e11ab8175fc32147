"""Ring attention: each device of a mesh axis holds a part of the queries, and the keys of all go round.

Inside `jax.shard_map`. A device attends with its queries to the keys that are there, sends those on to its neighbour,
and merges what the parts gave by their log-sum-exp. The backward pass sends the keys round once more, with the sums of
their gradients, and weighs each part by the final log-sum-exp, so that neither pass holds more than two devices' keys.
Source: Liu et al. 2023 (Ring Attention).

A causal row's keys are seen by what comes after them: were each device given one piece of the row, the first would
have one piece to attend to and the last all. Each takes two stripes instead, the i-th from the front and the i-th from
the end, and every step of the ring is then the same work for all (Brandon et al. 2023 balance it in another way). Rows
lie in one piece a device everywhere else: queries, keys, values and outputs change places before and after, which is as
much traffic as two more steps of the ring. Pairs of blocks that see nothing are left out by the implementation.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm.attention import BucketBias, Mask, Passes, attention_passes
from llm.attention.blocks import row_terms, sinks_gradient, with_sinks
from llm.attention.merge import merge_stacked


@dataclasses.dataclass(frozen=True)
class Ring:
    """How a call goes round.

    Attributes:
        axis, devices: the mesh axis and its size.
        striped: whether each device holds two stripes, one from either end of the row.
        ahead: how many devices further the keys lie that a device meets first.
        steps: how many devices' keys each meets; those of the others no query may see.
    """

    axis: str
    devices: int
    striped: bool
    ahead: int
    steps: int

    @classmethod
    def of(cls, axis: str, devices: int, mask: Mask, queries: int, keys: int) -> "Ring":
        """The ring of a call on whole rows. A window over places in order leaves out the devices beyond it."""
        left, right = mask.window or (None, None)
        if mask.causal and mask.prefix_lengths_B is None:
            right = 0
        in_order = mask.q_positions_BT is None and mask.kv_positions_BS is None and queries == keys

        def reach(side: int | None) -> int:
            if side is None or not in_order:
                return devices - 1
            return min(devices - 1, -(-side * devices // keys))

        striped = mask.causal and left is None
        steps = 1 + (devices - 1 if striped else reach(left) + reach(right))
        return (
            cls(axis, devices, striped, 0, devices)
            if steps >= devices
            else cls(axis, devices, striped, reach(right), steps)
        )

    def send(self, x: Any, by: int = 1) -> Any:
        """Arrays of every device to the one `by` places further."""
        pairs = [(i, (i + by) % self.devices) for i in range(self.devices)]
        return x if by % self.devices == 0 else jax.lax.ppermute(x, self.axis, pairs)

    def deal(self, x: jax.Array, axis: int) -> jax.Array:
        """From a piece of the row to this device's stripes."""
        if not self.striped:
            return x
        stripes = jnp.split(x, 2, axis)
        even, odd = (jax.lax.ppermute(s, self.axis, self._owners(i)) for i, s in enumerate(stripes))
        # Stripe i of an even device is an even one, and the i-th from the end an odd one.
        first = jax.lax.axis_index(self.axis) % 2 == 0
        return jnp.concatenate([jnp.where(first, even, odd), jnp.where(first, odd, even)], axis)

    def collect(self, x: jax.Array, axis: int) -> jax.Array:
        """Back from this device's stripes to a piece of the row."""
        if not self.striped:
            return x
        low, high = jnp.split(x, 2, axis)
        first = jax.lax.axis_index(self.axis) % 2 == 0
        stripes = jnp.where(first, low, high), jnp.where(first, high, low)
        back = ([(to, source) for source, to in self._owners(i)] for i in range(2))
        return jnp.concatenate([jax.lax.ppermute(s, self.axis, pairs) for s, pairs in zip(stripes, back)], axis)

    def _owners(self, half: int) -> list[tuple[int, int]]:
        """(device, owner of the stripe that is this half of its piece)."""
        stripes = [(i, 2 * i + half) for i in range(self.devices)]
        return [(i, stripe if stripe < self.devices else 2 * self.devices - 1 - stripe) for i, stripe in stripes]

    def by_owner(self, x: jax.Array) -> jax.Array:
        """The last axis, of all keys in the order of the row, with each device's keys together."""
        if not self.striped or x.shape[-1] == 1:
            return x
        order = np.arange(self.devices)
        order = np.stack([order, 2 * self.devices - 1 - order], 1).reshape(-1)
        stripes = x.reshape(*x.shape[:-1], 2 * self.devices, -1)
        return stripes[..., order, :].reshape(x.shape)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The static arguments of `llm.attention.attention`, sinks and log-sum-exp aside."""

    scale: float | None = None
    softcap: float | None = None
    dropout_rate: float = 0.0
    precision: jax.lax.PrecisionLike = None
    implementation: str = "auto"


def ring_attention(
    ring: Ring, settings: Settings, q_BTNH, k_BSKH, v_BSKH, *, mask: Mask, bias=None, sinks_N=None, key=None, offset
) -> tuple[jax.Array, jax.Array]:
    """(out_BTNH in the dtype of q, lse_BTN in float32) of this device's piece of the rows.

    Args:
        ring, settings: how it goes round, and what it computes.
        q_BTNH, k_BSKH, v_BSKH: this device's pieces.
        mask: with the positions of both sides; its fields of single queries and keys are this device's, a dense mask
            has this device's queries and all keys.
        bias: an array as a dense mask, or a BucketBias.
        sinks_N: of this device's heads.
        key, offset: of dropout, which draws its bits by the positions of the mask.
    """
    q_BTNH, k_BSKH, v_BSKH = (ring.deal(x, 1) for x in (q_BTNH, k_BSKH, v_BSKH))
    dense_BNTS = mask.dense_BNTS
    fields: dict[str, Any] = {name: getattr(mask, name) for name in ("q_positions_BT", "q_segments_BT", *_TRAVELLING)}
    fields = {name: None if x is None else ring.deal(x, 1) for name, x in fields.items()}
    if dense_BNTS is not None:
        dense_BNTS = ring.by_owner(ring.deal(dense_BNTS, 2))
    if bias is not None and not isinstance(bias, BucketBias):
        bias = ring.by_owner(bias if bias.shape[2] == 1 else ring.deal(bias, 2))
    mask = dataclasses.replace(mask, dense_BNTS=dense_BNTS, **fields)
    result: Any = _attend(ring, settings, q_BTNH, k_BSKH, v_BSKH, bias, sinks_N, mask, key, offset)
    out_BTNH, lse_BTN = result  # custom_vjp hides its type
    return ring.collect(out_BTNH, 1), ring.collect(lse_BTN, 1)


_TRAVELLING = ("kv_positions_BS", "kv_segments_BS")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(ring: Ring, settings: Settings, q_BTNH, k_BSKH, v_BSKH, bias, sinks_N, mask, key, offset):
    return _forward(ring, settings, q_BTNH, k_BSKH, v_BSKH, bias, sinks_N, mask, key, offset)[0]


def _start(ring: Ring, k_BSKH, v_BSKH, mask: Mask):
    """What goes round, where the first step meets it."""
    return ring.send((k_BSKH, v_BSKH, {name: getattr(mask, name) for name in _TRAVELLING}), -ring.ahead)


def _part(ring: Ring, settings: Settings, step, q_BTNH, travelling, bias, mask: Mask, key, offset) -> Passes:
    """The passes of this device's queries over the keys that are there at a step."""
    k_BSKH, v_BSKH, fields = travelling
    first = _first_key(ring, step, k_BSKH.shape[1])

    def columns(x):
        return x if x is None or x.shape[3] == 1 else jax.lax.dynamic_slice_in_dim(x, first, k_BSKH.shape[1], 3)

    return attention_passes(
        q_BTNH,
        k_BSKH,
        v_BSKH,
        mask=dataclasses.replace(mask, dense_BNTS=columns(mask.dense_BNTS), **fields),
        bias=bias if isinstance(bias, BucketBias) else columns(bias),
        dropout_key=key,
        dropout_offset=offset,
        **{field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)},
    )


def _first_key(ring: Ring, step, keys: int) -> jax.Array:
    """Where the keys of a step begin in the columns of a dense mask or bias."""
    return (jax.lax.axis_index(ring.axis) + ring.ahead - step) % ring.devices * keys


def _forward(ring: Ring, settings: Settings, q_BTNH, k_BSKH, v_BSKH, bias, sinks_N, mask, key, offset):
    def body(step, carry):
        travelling, out_BTNH, lse_BTN = carry
        out, lse = _part(ring, settings, step, q_BTNH, travelling, bias, mask, key, offset).forward()
        out_BTNH, lse_BTN = merge_stacked(jnp.stack([out_BTNH, out]), jnp.stack([lse_BTN, lse]))
        return ring.send(travelling), out_BTNH, lse_BTN

    rows = q_BTNH.shape[:3]
    empty = jnp.zeros((*rows, v_BSKH.shape[3]), jnp.float32), jnp.full(rows, -jnp.inf, jnp.float32)
    start = _start(ring, k_BSKH, v_BSKH, mask), *empty
    _, out_BTNH, lse_BTN = jax.lax.fori_loop(0, ring.steps, body, start)
    out_BTNH, lse_BTN = with_sinks(out_BTNH, lse_BTN, sinks_N)
    residuals = q_BTNH, k_BSKH, v_BSKH, bias, sinks_N, mask, key, offset, out_BTNH, lse_BTN
    return (out_BTNH.astype(q_BTNH.dtype), lse_BTN), residuals


def _backward(ring: Ring, settings: Settings, residuals, cotangents):
    q_BTNH, k_BSKH, v_BSKH, bias, sinks_N, mask, key, offset, out_BTNH, lse_BTN = residuals
    dout_BTNH, dlse_BTN = cotangents

    def body(step, carry):
        travelling, dk, dv, dq, dbias = carry
        part = _part(ring, settings, step, q_BTNH, travelling, bias, mask, key, offset)
        more_dq, more_dk, more_dv, more_dbias = part.backward(out_BTNH, lse_BTN, dout_BTNH, dlse_BTN)
        first = _first_key(ring, step, k_BSKH.shape[1])

        def add(total, more):
            if total.shape == more.shape:
                return total + more
            return jax.lax.dynamic_update_slice_in_dim(total, more.astype(jnp.float32), first, 3)

        dbias = jax.tree.map(add, dbias, more_dbias)
        travelling, dk, dv = ring.send((travelling, dk + more_dk, dv + more_dv))
        return travelling, dk, dv, dq + more_dq, dbias

    zeros = (jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), x) for x in (k_BSKH, v_BSKH, q_BTNH, bias))
    start = _start(ring, k_BSKH, v_BSKH, mask), *zeros
    _, dk, dv, dq, dbias = jax.lax.fori_loop(0, ring.steps, body, start)
    dk, dv = ring.send((dk, dv), ring.ahead - ring.steps)
    dbias = jax.tree.map(lambda d, x: d.astype(x.dtype), dbias, bias)
    dsinks = sinks_gradient(sinks_N, *row_terms(out_BTNH, lse_BTN, dout_BTNH, dlse_BTN))
    found = (d.astype(x.dtype) for d, x in ((dq, q_BTNH), (dk, k_BSKH), (dv, v_BSKH)))
    return *found, dbias, dsinks, None, None, None


_attend.defvjp(_forward, _backward)
