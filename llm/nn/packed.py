"""Matrices kept in 8 or 4 bits a weight, and their products with rows.

A group of 32 inputs of one output shares a scale, and with 4 bits also the least weight: a weight is scale * value, or
least + scale * value, as in llama.cpp's Q8_0 and Q4_1. Products are of the weights so rounded and of rows that are not;
the compiled ones round those too where there are few, to 16 bits a group of 32 inputs. Sums are float32.
"""

from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

GROUP = 32
BITS = (8, 4)
MANY = 128  # rows
NATIVE = "llm_packed_product"  # the name that `llm.nn.native` registers its function by


@flax.struct.dataclass
class Packed:
    """A matrix of O outputs and I inputs, or one for each layer, with G groups of inputs.

    Attributes:
        values: (..., O, G, 32) int8 within +-127; with 4 bits (..., O, G, 16) uint8, inputs 0 to 15 of a group in the
            low halves of its bytes, 16 to 31 in the high ones.
        scales, least: (..., O, G) float16; with 8 bits `least` is None.
        native: products are computed by `llm.nn.native`, which is loaded, and not by XLA.
    """

    values: jax.Array
    scales: jax.Array
    least: jax.Array | None
    native: bool = flax.struct.field(pytree_node=False, default=False)

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return self.values.shape[-3], self.values.shape[-2] * GROUP

    def __getitem__(self, index: Any) -> "Packed":
        """The matrices of some layers, or the rows of some outputs: indexes the leading axis."""
        return jax.tree.map(lambda x: x[index], self)


def pack(matrix_OI: np.ndarray, bits: int, native: bool = False) -> Packed:
    """Rounds a float matrix, or one for each layer, to `bits` a weight, 8 or 4.

    Raises:
        ValueError: the inputs do not divide into groups of 32, or other bits.
    """
    if bits not in BITS or matrix_OI.shape[-1] % GROUP:
        raise ValueError(f"{bits} bits of {matrix_OI.shape}: expected {BITS} and inputs that {GROUP} divides")
    groups = np.asarray(matrix_OI, np.float32).reshape(*matrix_OI.shape[:-1], -1, GROUP)
    least = None
    if bits == 8:
        scales = (np.abs(groups).max(-1) / 127).astype(np.float16)
        values = np.clip(_parts(groups, scales), -127, 127).astype(np.int8)
    else:
        least = groups.min(-1).astype(np.float16)
        scales = ((groups.max(-1) - groups.min(-1)) / 15).astype(np.float16)
        found = np.clip(_parts(groups - least[..., None].astype(np.float32), scales), 0, 15).astype(np.uint8)
        values = found[..., :16] | found[..., 16:] << 4
    return Packed(jnp.asarray(values), jnp.asarray(scales), None if least is None else jnp.asarray(least), native)


def _parts(groups: np.ndarray, scales: np.ndarray) -> np.ndarray:
    scales = scales[..., None].astype(np.float32)
    return np.rint(np.divide(groups, scales, out=np.zeros_like(groups), where=scales > 0))


def unpack(packed: Packed) -> jax.Array:
    """The float32 matrices (..., O, I)."""
    values, scales = packed.values, packed.scales[..., None].astype(jnp.float32)
    if packed.least is None:
        weights = values.astype(jnp.float32) * scales
    else:
        found = jnp.concatenate([values & 15, values >> 4], axis=-1)
        weights = found.astype(jnp.float32) * scales + packed.least[..., None].astype(jnp.float32)
    return weights.reshape(*weights.shape[:-2], -1)


def product(x_RI: jax.Array, packed: Packed) -> jax.Array:
    """y_RO, float32: the products of rows with every output of one matrix."""
    return products(x_RI, [packed])[0]


def products(x_RI: jax.Array, matrices: Sequence[Packed]) -> list[jax.Array]:
    """y_RO of each of some matrices that are packed alike.

    By XLA, a single row reads the packed weights as they are; more rows read them as float32, made by the way. Of many
    rows XLA's product of float32 matrices is the fastest, with their making. The compiled form takes all matrices at
    once: threads are called together once.
    """
    x_RI, rows = x_RI.astype(jnp.float32), x_RI.shape[0]
    if matrices[0].native and rows < MANY:
        none = jnp.zeros((0, 0), jnp.float16)
        parts = [x for m in matrices for x in (m.values, m.scales, none if m.least is None else m.least)]
        results = [jax.ShapeDtypeStruct((rows, m.shape[0]), jnp.float32) for m in matrices]
        return list(jax.ffi.ffi_call(NATIVE, results)(x_RI, *parts))
    return [_by_xla(x_RI, packed) for packed in matrices]


def _by_xla(x_RI: jax.Array, packed: Packed) -> jax.Array:
    if x_RI.shape[0] > 1:
        return x_RI @ unpack(packed).T
    x_GI = x_RI.reshape(-1, GROUP)
    scales = packed.scales[..., None].astype(jnp.float32)
    if packed.least is None:
        # Multiplied and summed in this form, XLA on CPU reads no more than the packed bytes; a product would write the
        # float32 matrix first.
        return (packed.values.astype(jnp.float32) * x_GI * scales).sum((1, 2))[None]
    low, high = (packed.values & 15).astype(jnp.float32), (packed.values >> 4).astype(jnp.float32)
    parts = ((low * x_GI[:, :16] + high * x_GI[:, 16:]) * scales).sum((1, 2))
    return (parts + packed.least.astype(jnp.float32) @ x_GI.sum(1))[None]
