"""Relative-position bias kept as a small table and looked up inside a block, never forced to T x S (T5)."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def relative_position_bucket(
    relative_position: Any, *, bidirectional: bool, buckets: int = 32, max_distance: int = 128, xp: Any = jnp
) -> jax.Array:
    """Bucket of each relative position (key position minus query position), an int32 array of the same shape.

    Near distances get a bucket each, farther ones share logarithmically wider buckets up to `max_distance`, and all
    beyond share the last. Bidirectional stacks use half of the buckets for keys after the query; causal ones put
    every key after the query into bucket 0. `xp` is the array library, numpy or jax.numpy.

    Source: Raffel et al. 2020 (T5), section 2.1.
    """
    offset = xp.zeros_like(relative_position)
    if bidirectional:
        buckets //= 2
        offset = xp.where(relative_position > 0, buckets, 0)
        distance = xp.abs(relative_position)
    else:
        distance = xp.maximum(-relative_position, 0)
    exact = buckets // 2
    # float32 whatever the model's dtype: in bfloat16 neighbouring distances would share a logarithm.
    ratio = xp.log(xp.maximum(distance, 1).astype(jnp.float32) / exact) / math.log(max_distance / exact)
    far = exact + (ratio * (buckets - exact)).astype(jnp.int32)
    return offset + xp.where(distance < exact, distance, xp.minimum(far, buckets - 1)).astype(jnp.int32)


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

    def intervals(self) -> np.ndarray:
        """The relative positions of every bucket as closed intervals, int32 of shape (R, 2), empty where low > high.

        A kernel looks a tile up by one comparison a bucket, and leaves out the buckets that the tile cannot meet.
        """
        reach, far = self.max_distance + 1, 2**30
        relative = np.arange(-reach, reach + 1)
        buckets = self.table_RN.shape[0]
        bucket = relative_position_bucket(
            relative, bidirectional=self.bidirectional, buckets=buckets, max_distance=self.max_distance, xp=np
        )
        # Beyond max_distance on either side the bucket stays what it is at the end.
        relative[0], relative[-1] = -far, far
        result = np.array([[1, 0]] * buckets, np.int32)
        for r in np.unique(bucket):
            result[r] = relative[bucket == r].min(), relative[bucket == r].max()
        return result
