"""Relative-position bias kept as a small table and looked up inside a block, never forced to T x S (T5)."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp


def relative_position_bucket(
    relative_position: jax.Array, *, bidirectional: bool, buckets: int = 32, max_distance: int = 128
) -> jax.Array:
    """Bucket of each relative position (key position minus query position), an int32 array of the same shape.

    Near distances get a bucket each, farther ones share logarithmically wider buckets up to `max_distance`, and all
    beyond share the last. Bidirectional stacks use half of the buckets for keys after the query; causal ones put
    every key after the query into bucket 0. Source: Raffel et al. 2020 (T5), section 2.1.
    """
    offset = jnp.zeros_like(relative_position)
    if bidirectional:
        buckets //= 2
        offset = jnp.where(relative_position > 0, buckets, 0)
        distance = jnp.abs(relative_position)
    else:
        distance = jnp.maximum(-relative_position, 0)
    exact = buckets // 2
    # float32 whatever the model's dtype: in bfloat16 neighbouring distances would share a logarithm.
    ratio = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact) / math.log(max_distance / exact)
    far = exact + (ratio * (buckets - exact)).astype(jnp.int32)
    return offset + jnp.where(distance < exact, distance, jnp.minimum(far, buckets - 1)).astype(jnp.int32)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("table_RN",), meta_fields=("bidirectional", "max_distance")
)
@dataclasses.dataclass(frozen=True)
class BucketBias:
    """A learned bias for every bucket of relative position and every query head, `table_RN`."""

    table_RN: jax.Array
    bidirectional: bool = False
    max_distance: int = 128

    def at(self, q_positions_BT: jax.Array, kv_positions_BS: jax.Array) -> jax.Array:
        """The bias of a block of queries against a block of keys: float32 of shape (B or 1, N, T, S)."""
        relative = kv_positions_BS[:, None, :] - q_positions_BT[:, :, None]
        bucket = relative_position_bucket(
            relative,
            bidirectional=self.bidirectional,
            buckets=self.table_RN.shape[0],
            max_distance=self.max_distance,
        )
        return jnp.moveaxis(self.table_RN.astype(jnp.float32)[bucket], -1, 1)
