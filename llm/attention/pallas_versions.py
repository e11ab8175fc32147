"""Pallas Mosaic GPU as the kernels of this folder use it, on a device or in its interpreter.

All that differs between JAX 0.10 and 0.11, and between the two ways to run, is here. The interpreter has no layouts of
registers, and matrix products take place where they are written: memory, barriers, copies and loops are the same.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

plgpu: Any = mosaic_gpu  # some of its names are made when they are asked for
TILE = plgpu.Layout.WGMMA
ALONG = (plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0))  # a vector along the rows, along the columns


@functools.cache
def interpreter(detect_races: bool = False):
    """Parameters of the Mosaic GPU interpreter: uninitialised memory reads NaN, and what is out of bounds raises."""
    kind: Any = getattr(plgpu, "InterpretParams", None)  # public from JAX 0.11
    if kind is None:
        from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams as kind
    return kind(detect_races=detect_races)


class Machine:
    """The operations of a kernel body whose form depends on where it runs."""

    def __init__(self, interpret: bool):
        self.interpret = interpret

    def vector(self, x: jax.Array, axis: int = 0) -> jax.Array:
        """A vector along the rows (axis 0) or columns (1) of tiles."""
        return x if self.interpret else plgpu.layout_cast(x, ALONG[axis])

    def zeros(self, *shape: int) -> jax.Array:
        """A float32 tile of zeros."""
        x = jnp.zeros(shape, jnp.float32)
        return x if self.interpret else plgpu.layout_cast(x, TILE)

    def index(self, shape: tuple[int, int], axis: int) -> jax.Array:
        """The int32 index along an axis at every place of a tile."""
        if self.interpret:
            return lax.broadcasted_iota(jnp.int32, shape, axis)
        return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=TILE)

    def load(self, ref, index: tuple, axis: int | None = None) -> jax.Array:
        """What `index` picks from memory: a tile, or a vector along an axis of tiles."""
        if self.interpret:
            return ref[index]
        return plgpu.load(ref, index, layout=TILE if axis is None else ALONG[axis], optimized=False)

    def product(self, a, b, during: Callable[[], None] | None = None) -> jax.Array:
        """a b^T in float32 of two matrices in shared memory; `during` is called while it is computed."""
        if self.interpret:
            if during is not None:
                during()
            return _dot(a[...], b[...], 1)

        def body(ref):
            plgpu.wgmma(ref, a, b.transpose((1, 0)))
            if during is not None:
                during()
            return ref[...]

        return pl.run_scoped(body, plgpu.ACC((a.shape[0], b.shape[0]), jnp.float32))

    def two_products(self, first: tuple, second: tuple, between: Callable[[jax.Array], Any]):
        """`product` of two pairs: (between(the first), the second), where `between` overlaps the second product."""
        if self.interpret:
            return between(self.product(*first)), self.product(*second)

        def body(one, two):
            plgpu.wgmma(one, first[0], first[1].transpose((1, 0)))
            plgpu.wgmma(two, second[0], second[1].transpose((1, 0)))
            result = between(plgpu.wgmma_accumulator_load(one, wait_n=1))
            return result, two[...]

        shapes = [plgpu.ACC((a.shape[0], b.shape[0]), jnp.float32) for a, b in (first, second)]
        return pl.run_scoped(body, *shapes)

    def each(self, plain: Callable, registers: Callable, x: jax.Array, *others: jax.Array) -> jax.Array:
        """plain(x, *others) of a float32 tile and uint32 ones, a float32 tile; on a device register by register.

        `registers` makes the same of MLIR values. Left to itself the compiler does a long chain of operations step by
        step on the whole tile, and spills.
        """
        if self.interpret:
            return plain(x, *others)

        @plgpu.inline_mgpu(
            arg_types=(TILE,) * (1 + len(others)), return_type=plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=TILE)
        )
        def run(_, x, *others):
            return x._pointwise(registers, *others)

        return run(x, *(plgpu.layout_cast(y, TILE) for y in others))

    def add_products(self, totals: tuple, factors: tuple) -> tuple:
        """total + a b for every total and (a, b), all in flight at once; a is in registers and b in shared memory."""
        if self.interpret:
            return tuple(total + _dot(a, b[...], 0) for total, (a, b) in zip(totals, factors))

        def body(refs):
            for ref, (a, b) in zip(refs, factors):
                plgpu.wgmma(ref, a, b)

        return tuple(pl.run_state(body)(tuple(plgpu.ACC.init(total) for total in totals)))


def spread(vector: jax.Array, shape: tuple[int, int], axis: int) -> jax.Array:
    """A vector along an axis of a tile, repeated along the other."""
    return lax.broadcast_in_dim(vector, shape, [axis])


def _dot(a, b, axis: int):
    return lax.dot_general(a, b, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32)


def matrices(rows: int, width: int, dtype, *copies: int, over: int) -> Any:
    """Matrices in shared memory as the tensor cores read them, for products over blocks of `over` rows.

    All operands of a product need one swizzle; that of 64 bytes allows products over 32 rows, that of 128 over 64.
    """
    swizzle = 128 if over % 64 == 0 else 64
    lanes = swizzle // jnp.dtype(dtype).itemsize
    transforms = (plgpu.TilingTransform((8, lanes)), plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM((*copies, rows, width), dtype, transforms=transforms)


def launch(
    body: Callable, operands: Sequence[jax.Array], outputs: list, scratch: list, *, ctas: int, threads: int, interpret
):
    """Runs body(operand refs, output refs, scratch refs) on `ctas` blocks of `threads` warpgroups.

    `interpret` is None on a device, else parameters of the interpreter. Returns the outputs as a list.
    """
    count = len(operands), len(outputs)

    def kernel(*refs):
        body(refs[: count[0]], refs[count[0] : sum(count)], refs[sum(count) :])

    return plgpu.kernel(
        kernel,
        out_type=outputs,
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        grid=(ctas,),
        grid_names=("cta",),
        num_threads=threads,
        thread_name="wg",
        **({} if interpret is None else {"interpret": interpret}),
    )(*operands)
