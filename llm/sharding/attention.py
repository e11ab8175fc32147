"""Attention on a mesh: each device attends with its own rows and heads."""

import dataclasses
import math

import jax
from jax.sharding import PartitionSpec

from llm.attention import BucketBias, Mask
from llm.attention import attention as local_attention
from llm.sharding.rules import RULES


def attention(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, **arguments):
    """`llm.attention.attention` on the current mesh (`jax.set_mesh`); without a mesh, that function itself.

    Rows are split as the rule of "batch" says and heads as that of "kv_heads", where their numbers divide; what does
    not is computed by every device of the axis, as are the axes of "length". Dropout draws the bits of one device.
    The loops of an implementation then run over what a device holds: left to the partitioner, every step of a loop
    over the rows of a split array would gather it.

    Takes, returns and raises what `llm.attention.attention` does; shapes are those of the whole arrays.
    """
    mesh = jax.sharding.get_abstract_mesh()
    free = {name: size for name, size in mesh.shape.items() if size > 1 and name not in mesh.manual_axes}
    if not free:
        return local_attention(q_BTNH, k_BSKH, v_BSKH, **arguments)

    def split(rule: str, *sizes: int) -> tuple[str, ...] | None:
        axes = RULES[rule]
        axes = tuple(axis for axis in ((axes,) if isinstance(axes, str) else axes or ()) if axis in free)
        parts = math.prod(free[axis] for axis in axes)
        return axes if axes and all(size % parts == 0 for size in sizes) else None

    (batch, _, heads, _), key_heads = q_BTNH.shape, k_BSKH.shape[2]
    rows, columns = split("batch", batch), split("kv_heads", heads, key_heads)

    def place(x: jax.Array, *axes) -> PartitionSpec:
        return PartitionSpec(*(axis if size > 1 else None for axis, size in zip(axes, x.shape)))

    traced = ("mask", "bias", "sinks_N", "dropout_key", "dropout_offset")
    arrays = {name: x for name, x in arguments.items() if name in traced}
    rest = {name: x for name, x in arguments.items() if name not in arrays}

    def spec(name, x):
        if isinstance(x, Mask):
            fields = {f.name: getattr(x, f.name) for f in dataclasses.fields(x)}
            specs = {
                n: place(a, rows, columns) if n == "dense_BNTS" else place(a, rows)
                for n, a in fields.items()
                if hasattr(a, "shape")
            }
            return dataclasses.replace(x, **specs)
        if isinstance(x, BucketBias):
            return dataclasses.replace(x, table_RN=place(x.table_RN, None, columns))
        if x is None or name.startswith("dropout"):
            return PartitionSpec()
        return place(x, rows, columns) if name == "bias" else place(x, columns)

    qkv = PartitionSpec(rows, None, columns, None)
    out = PartitionSpec(rows, None, columns, None)
    lse = PartitionSpec(rows, None, columns)

    def first(axes, size: int) -> int | jax.Array:
        return 0 if axes is None else jax.lax.axis_index(axes) * size

    def on_one(q, k, v, arrays):
        row, head = arrays.pop("dropout_offset", (0, 0))
        offset = row + first(rows, q.shape[0]), head + first(columns, q.shape[2])
        return local_attention(q, k, v, dropout_offset=offset, **arrays, **rest)

    return jax.shard_map(
        on_one,
        mesh=mesh,
        in_specs=(qkv, qkv, qkv, {name: spec(name, x) for name, x in arrays.items()}),
        out_specs=(out, lse) if arguments.get("return_lse") else out,
        check_vma=False,
    )(q_BTNH, k_BSKH, v_BSKH, arrays)
