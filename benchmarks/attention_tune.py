"""Measures the block sizes of our attention kernels on the device at hand and writes the best into their table."""

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.attention import clock
from benchmarks.attention_cases import tolerance
from benchmarks.attention_peers import Prepared, one_line
from llm.attention import Mask, api, attention, block_sizes
from llm.attention.block_sizes import CANDIDATES, Blocks
from llm.attention.target import target
from llm.errors import InputError, RunFailed

KERNELS = {"tpu": "mosaic_tpu", "gpu": "mosaic_gpu"}
# B, T, S, N, K of what is timed: a training step's shape, and for "decode" one query a row on a long cache.
SHAPE, DECODE_SHAPE = (2, 4096, 4096, 16, 16), (8, 1, 32768, 32, 8)


def tune(dtype: str, widths: list[int], repeats: int, shape=SHAPE, decode_shape=DECODE_SHAPE) -> None:
    """Times the candidates of every pass and head width, causal, alternating, and writes the fastest.

    A candidate whose numbers differ from those of the default sizes is an error; one that does not compile, because it
    does not fit, is left out.

    Raises:
        InputError: there is no kernel of ours for this device.
        RunFailed: a candidate gave wrong numbers.
    """
    here = target()
    if here.platform not in KERNELS:
        raise InputError(f"--tune: there is no attention kernel of ours for the platform {here.platform} to tune")
    kernel = KERNELS[here.platform]
    x = jnp.zeros((1, 1, 1, 64), dtype)
    module = api.PARTIAL[kernel]
    if lacking := module.why_not_here() or module.lacks(
        x, x, x, mask=Mask(), bias=None, softcap=None, sinks_N=None, dropout_rate=0.0
    ):
        raise InputError(f"--tune: {kernel} {lacking}")
    table = json.loads(block_sizes.TABLE.read_text())
    for width in widths:
        for which in (name for owner, name in CANDIDATES if owner == kernel):
            best = fastest(kernel, which, dtype, width, repeats, decode_shape if which == "decode" else shape)
            key = block_sizes.key(kernel, which, width, dtype)
            table.setdefault(here.kind, {})[key] = [best.q_block, best.k_block, best.stages]
            # After every pass: a machine that goes away leaves what was measured.
            block_sizes.TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    print(f"-> {block_sizes.TABLE.name}, {here.kind}")


def fastest(kernel: str, which: str, dtype: str, width: int, repeats: int, shape) -> Blocks:
    """The candidate of the least median time."""
    here = target()
    B, T, S, N, K = shape
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(B, *s, width)), dtype) for s in ((T, N), (S, K), (S, K)))
    call: Any = functools.partial(attention, mask=Mask(causal=True), implementation=kernel)

    def loss(q, k, v):
        return jnp.square(call(q, k, v).astype(jnp.float32)).sum()

    f = call if which in ("forward", "decode") else jax.grad(loss, (0, 1, 2))
    default = block_sizes.block_sizes(kernel, which, here.kind, width, dtype)
    ready: dict[str, Prepared] = {}
    sizes: dict[str, Blocks] = {}
    wanted = None
    for candidate in dict.fromkeys([default, *CANDIDATES[kernel, which]]):
        name = f"{candidate.q_block} x {candidate.k_block}" + (
            f" x {candidate.stages}" if here.platform == "gpu" else ""
        )
        try:
            with block_sizes.using(kernel, **{which: candidate}):
                compiled = jax.jit(f).lower(q, k, v).compile()
            results = jax.device_get(jax.tree.leaves(compiled(q, k, v)))
        except Exception as error:
            # Too large for the chip, or a size that the kernel cannot have; the default must run.
            if candidate == default:
                raise
            print(f"  {which} {width}: {name} left out: {one_line(error)}")
            continue
        results = [np.asarray(x, np.float32) for x in results]
        wanted = wanted or results
        for have, want in zip(results, wanted):
            error = np.abs(have - want).max() / max(1.0, np.abs(want).max())
            if not error <= tolerance(dtype, here.platform == "cpu"):
                raise RunFailed(f"--tune: {kernel} {which} with blocks {name} is off by {error:.1e} from {default}")
        sizes[name] = candidate
        ready[name] = Prepared(
            dispatch=functools.partial(compiled, q, k, v), wait=jax.block_until_ready, fetch=lambda x: {},
            peak_bytes=lambda: None,
        )  # fmt: skip
    medians = {name: float(np.median(times)) for name, times in clock(ready, repeats).items()}
    for name in sorted(medians, key=medians.__getitem__):
        mark = ", the default" if sizes[name] == default else ""
        print(f"  {which} {width}: {name} {1e3 * medians[name]:.3f} ms{mark}")
    return sizes[min(medians, key=medians.__getitem__)]
