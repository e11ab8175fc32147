"""Queries and keys of a block of our Pallas kernels, by device kind, head width and dtype.

`python -m benchmarks.attention --tune` measures candidates on the device at hand and prints lines for `MEASURED`.
"""

import dataclasses

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes of one kernel call: queries and keys of a block, and blocks of keys in flight at once (GPU only)."""

    q_block: int
    k_block: int
    stages: int = 2


# (device kind, pass, head width, bytes of a number) -> sizes. Passes: "forward", "backward" on TPU; "forward", "dq",
# "dkv" on GPU. Only what was measured on the device stands here.
MEASURED: dict[tuple[str, str, int, int], Blocks] = {}

# Where nothing was measured: sizes that compile without spills and fit on-chip memory on every generation that the
# tests compile for.
_TPU = {
    ("forward", 128): Blocks(512, 512),
    ("forward", 256): Blocks(512, 512),
    ("backward", 128): Blocks(512, 512),
    ("backward", 256): Blocks(256, 512),
}
_TPU_WIDER = Blocks(128, 256)


def of_tpu(kind: str, which: str, width: int, dtype) -> Blocks:
    """Sizes for a TPU kernel whose heads are padded to `width`, a multiple of 128."""
    measured = MEASURED.get((kind, which, width, jnp.dtype(dtype).itemsize))
    return measured or _TPU.get((which, width), _TPU_WIDER)
