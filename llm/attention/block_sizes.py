"""Block sizes of our Pallas kernels by device kind, pass, head width and dtype.

What was measured on a device is in `block_sizes.json` beside this file; `python -m benchmarks.attention --tune`
measures the candidates on the device at hand and writes them there. Where nothing was measured, `DEFAULTS` holds:
sizes that compile, fit the memory of the chip and do not spill on every generation that is checked.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib

import jax.numpy as jnp

TABLE = pathlib.Path(__file__).with_suffix(".json")


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Queries and keys of a block; on GPUs also how many blocks of the ring in shared memory are in flight."""

    q_block: int
    k_block: int
    stages: int = 2


# (kernel, pass) -> {head width, padded as the kernel pads it: sizes}; wider heads have those of the widest.
DEFAULTS: dict[tuple[str, str], dict[int, Blocks]] = {
    ("mosaic_tpu", "forward"): {128: Blocks(512, 512), 256: Blocks(512, 512), 512: Blocks(128, 256)},
    ("mosaic_tpu", "backward"): {128: Blocks(512, 512), 256: Blocks(256, 512), 512: Blocks(128, 256)},
    ("mosaic_gpu", "forward"): {64: Blocks(128, 128, 3), 128: Blocks(128, 128, 2), 256: Blocks(128, 64, 2)},
    ("mosaic_gpu", "dq"): {64: Blocks(128, 64, 4), 128: Blocks(128, 64, 3), 256: Blocks(128, 32, 3)},
    ("mosaic_gpu", "dkv"): {64: Blocks(64, 128, 4), 128: Blocks(64, 128, 3), 256: Blocks(32, 64, 4)},
    ("mosaic_gpu", "decode"): {64: Blocks(64, 128, 4), 128: Blocks(64, 64, 4), 256: Blocks(64, 64, 2)},
}
# What --tune tries, beside the default. What does not compile or fit on a device is left out there.
CANDIDATES: dict[tuple[str, str], list[Blocks]] = {
    ("mosaic_tpu", "forward"): [Blocks(q, k) for q in (256, 512, 1024) for k in (256, 512, 1024)],
    ("mosaic_tpu", "backward"): [Blocks(q, k) for q in (256, 512, 1024) for k in (256, 512, 1024)],
    ("mosaic_gpu", "forward"): [Blocks(128, k, stages) for k in (64, 96, 128, 160) for stages in (2, 3, 4)],
    ("mosaic_gpu", "dq"): [Blocks(128, k, stages) for k in (32, 64, 96, 128) for stages in (2, 3, 4)],
    ("mosaic_gpu", "dkv"): [Blocks(q, k, stages) for q in (32, 64, 128) for k in (64, 128) for stages in (2, 3, 4)],
    ("mosaic_gpu", "decode"): [Blocks(64, k, stages) for k in (64, 128) for stages in (2, 3, 4, 6)],
}

_chosen: dict[tuple[str, str], Blocks] = {}


def block_sizes(kernel: str, which: str, kind: str, width: int, dtype) -> Blocks:
    """The sizes of one pass of a kernel on a device of this kind, for heads padded to `width`."""
    if (kernel, which) in _chosen:
        return _chosen[kernel, which]
    found = measured().get(kind, {}).get(key(kernel, which, width, dtype))
    if found:
        return Blocks(*found)
    defaults = DEFAULTS[kernel, which]
    return defaults[min((w for w in defaults if w >= width), default=max(defaults))]


def key(kernel: str, which: str, width: int, dtype) -> str:
    """The name of an entry in the table of a device: sizes go by the bytes of a number, not by its kind."""
    return f"{kernel} {which} {width} {8 * jnp.dtype(dtype).itemsize} bit"


@functools.cache
def measured() -> dict[str, dict[str, list[int]]]:
    """{device kind: {key: [q_block, k_block, stages]}}, as the tuner wrote it."""
    return json.loads(TABLE.read_text())


@contextlib.contextmanager
def using(kernel: str, **sizes: Blocks):
    """Calls traced inside use these sizes for the passes named (tuning, tests)."""
    before = dict(_chosen)
    _chosen.update({(kernel, which): blocks for which, blocks in sizes.items()})
    try:
        yield
    finally:
        _chosen.clear()
        _chosen.update(before)
