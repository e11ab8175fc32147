"""Attention on a mesh: each device attends with its own rows, heads and queries."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from llm.attention import BucketBias, Mask
from llm.attention import attention as local_attention
from llm.sharding.ring import Ring, Settings, ring_attention
from llm.sharding.rules import free_axes, split


def attention(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, **arguments):
    """`llm.attention.attention` on the current mesh (`jax.set_mesh`); without a mesh, that function itself.

    Rows are split as the rule of "batch" says and heads as that of "kv_heads", where their numbers divide; what does
    not is computed by every device of the axis. Queries are split as the rule of "length" says, and keys go round
    (`llm.sharding.ring`), where queries and keys both are a multiple of two stripes a device; else, as in a decoding
    step, keys are gathered and every device of the axis computes all. Dropout draws the bits of one device.

    The loops of an implementation then run over what a device holds: left to the partitioner, every step of a loop
    over the rows of a split array would gather it.

    Takes, returns and raises what `llm.attention.attention` does; shapes are those of the whole arrays.
    """
    free = free_axes()
    if not free:
        return local_attention(q_BTNH, k_BSKH, v_BSKH, **arguments)
    (batch, queries, heads, _), (keys, key_heads) = q_BTNH.shape, k_BSKH.shape[1:3]
    rows, columns, places = split("batch", batch), split("kv_heads", heads, key_heads), split("length", queries, keys)
    stripes = 2 * free[places[0]] if places else 1
    ring = None
    if places and queries and keys and queries % stripes == keys % stripes == 0:
        mask = arguments.get("mask", Mask())
        ring = Ring.of(places[0], free[places[0]], mask, queries, keys)
        q_positions, kv_positions = mask.positions(queries, keys)
        arguments["mask"] = dataclasses.replace(
            mask,
            q_positions_BT=jnp.broadcast_to(q_positions, (batch, queries)),
            kv_positions_BS=jnp.broadcast_to(kv_positions, (batch, keys)),
        )
    else:
        places = None

    def place(x: jax.Array, *axes) -> PartitionSpec:
        return PartitionSpec(*(axis if size > 1 else None for axis, size in zip(axes, x.shape)))

    traced = ("mask", "bias", "sinks_N", "dropout_key", "dropout_offset")
    arrays = {name: x for name, x in arguments.items() if name in traced}
    rest = {name: x for name, x in arguments.items() if name not in arrays}

    def spec(name, x):
        if isinstance(x, Mask):
            fields = {f.name: getattr(x, f.name) for f in dataclasses.fields(x)}
            specs = {
                n: place(a, rows, columns, places) if n == "dense_BNTS" else place(a, rows, places)
                for n, a in fields.items()
                if hasattr(a, "shape")
            }
            return dataclasses.replace(x, **specs)
        if isinstance(x, BucketBias):
            return dataclasses.replace(x, table_RN=place(x.table_RN, None, columns))
        if x is None or name.startswith("dropout"):
            return PartitionSpec()
        return place(x, rows, columns, places) if name == "bias" else place(x, columns)

    qkv = PartitionSpec(rows, places, columns, None)
    lse = PartitionSpec(rows, places, columns)

    def first(axes, size: int) -> int | jax.Array:
        return 0 if axes is None else jax.lax.axis_index(axes) * size

    def on_one(q, k, v, arrays):
        row, head = arrays.pop("dropout_offset", (0, 0))
        offset = row + first(rows, q.shape[0]), head + first(columns, q.shape[2])
        if ring is None:
            return local_attention(q, k, v, dropout_offset=offset, **arrays, **rest)
        key, settings = arrays.pop("dropout_key", None), dict(rest)
        return_lse = settings.pop("return_lse", False)
        out, lse = ring_attention(ring, Settings(**settings), q, k, v, key=key, offset=offset, **arrays)
        return (out, lse) if return_lse else out

    return jax.shard_map(
        on_one,
        mesh=jax.sharding.get_abstract_mesh(),
        in_specs=(qkv, qkv, qkv, {name: spec(name, x) for name, x in arrays.items()}),
        out_specs=(qkv, lse) if arguments.get("return_lse") else qkv,
        check_vma=False,
    )(q_BTNH, k_BSKH, v_BSKH, arrays)
