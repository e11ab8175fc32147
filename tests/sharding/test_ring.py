"""Ring attention on host devices against the float64 oracle, how its work is shared, and its passes one by one."""

import contextlib
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm.attention import Mask, attention_passes, merge
from llm.attention.blocks import sinks_gradient, with_sinks
from llm.sharding.ring import Ring
from tests.conformance import attention as table
from tests.helpers import ROOT, environment
from tests.quick import quick
from tests.sharding.ring import CASES


@pytest.mark.parametrize(
    "devices, implementation, names",
    [
        pytest.param(4, "reference", list(CASES), marks=pytest.mark.long),
        (2, "blockwise", ["causal", "everything", "everything, striped"]),
        (8, "reference", ["causal window, sinks", "window of both sides, soft cap", "everything, striped"]),
    ],
)
def test_a_ring_gives_attention_over_all_keys(devices, implementation, names):
    """Output, log-sum-exp and all gradients, dropout and all (float32, jitted)."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.sharding.ring", str(devices), implementation, *names],
        cwd=ROOT, env=environment(JAX_NUM_CPU_DEVICES="8"), capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    found = dict(json.loads(line) for line in result.stdout.splitlines())
    assert list(found) == names
    assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_causal_rows_are_the_same_work_for_every_device_at_every_step(devices):
    ring, length = Ring.of("context", devices, Mask(causal=True), 64, 64), 64 // devices
    places = np.asarray(ring.by_owner(jnp.arange(64))).reshape(devices, length)
    assert ring.steps == devices and sorted(places.ravel()) == list(range(64))
    for step in range(devices):
        seen = [(places[i][:, None] >= places[i - step]).sum() for i in range(devices)]
        assert len(set(seen)) == 1, (step, seen)


@pytest.mark.parametrize(
    "mask, steps, ahead",
    [
        (Mask(), 8, 0),
        (Mask(causal=True), 8, 0),
        (Mask(causal=True, window=(8, None)), 2, 0),  # eight places a device
        (Mask(causal=True, window=(9, None)), 3, 0),
        (Mask(causal=True, window=(0, None)), 1, 0),
        (Mask(window=(9, 1)), 4, 1),
        (Mask(window=(30, 30)), 8, 0),
        (Mask(causal=True, window=(8, None), prefix_lengths_B=jnp.ones(2, jnp.int32)), 8, 0),
        (Mask(causal=True, window=(8, None), kv_positions_BS=jnp.zeros((2, 64), jnp.int32)), 8, 0),
    ],
)
def test_devices_beyond_a_window_are_not_met(mask, steps, ahead):
    ring = Ring.of("context", 8, mask, 64, 64)
    assert (ring.steps, ring.ahead) == (steps, ahead)


PASSES = {
    "reference": ("reference", contextlib.nullcontext),
    "blockwise": ("blockwise", table.small_blocks),
    "mosaic_tpu": ("mosaic_tpu", table.tpu_in_small_blocks),
    "mosaic_gpu": ("mosaic_gpu", table.gpu_interpreted),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if "mosaic" in name else []) for name in PASSES]
)
def test_passes_over_parts_of_the_keys_are_those_of_the_whole(name):
    """Of every implementation, in the precision of its kernel, within twice the error of attention in plain XLA."""
    implementation, context = PASSES[name]
    dtype = "bfloat16" if name in ("mosaic_gpu", "blockwise") else "float32"
    c = table.Case(
        T=11, S=19, N=4, K=2, H=16, Hv=8, mask=table._mask(table._shuffled, table._documents, causal=True), sinks=True,
        bias="table", softcap=3.0, rate=0.3, dtype=dtype,
    )  # fmt: skip
    arrays, mask, (dout, dlse) = table.inputs(c)
    arrays["sinks_N"] = jnp.abs(arrays["sinks_N"].at[0].set(1.0))  # no row is then without a log-sum-exp

    def parts():
        for columns in (slice(0, 8), slice(8, 19)):
            seen = Mask(
                causal=True, q_positions_BT=mask.q_positions_BT, q_segments_BT=mask.q_segments_BT,
                kv_positions_BS=mask.kv_positions_BS[:, columns], kv_segments_BS=mask.kv_segments_BS[:, columns],
            )  # fmt: skip
            yield attention_passes(
                arrays["q"], arrays["k"][:, columns], arrays["v"][:, columns], mask=seen, bias=arrays["bias"],
                softcap=c.softcap, dropout_rate=c.rate, dropout_key=table.KEY, implementation=implementation,
            )  # fmt: skip

    def run():
        out, lse = with_sinks(*merge([part.forward() for part in parts()]), arrays["sinks_N"])
        assert out.dtype == lse.dtype == jnp.float32
        found = [part.backward(out, lse, dout, dlse) for part in parts()]
        stop, delta = lse, jnp.sum(dout.astype(jnp.float32) * out, -1) - dlse
        dq, dk, dv, dbias = zip(*found)
        assert [x[0].dtype for x in (dq, dk, dv)] == [c.dtype] * 3
        return {
            "out": out, "lse": lse, "dq": sum(x.astype(jnp.float32) for x in dq), "dk": jnp.concatenate(dk, 1),
            "dv": jnp.concatenate(dv, 1), "dbias": dbias[0].table_RN + dbias[1].table_RN,
            "dsinks": sinks_gradient(arrays["sinks_N"], stop, delta),
        }  # fmt: skip

    with context():
        got = jax.device_get(quick(run)())
    truth, bias = table.expected(c, arrays, mask, (dout, dlse))
    yardstick = table.plain(c, arrays, mask, (dout, dlse), bias)
    assert got.keys() == truth.keys()
    for what, want in truth.items():
        error, allowed = (np.abs(np.float64(x[what]) - want).max() for x in (got, yardstick))
        assert error <= 2 * allowed + 1e-6 * max(1.0, np.abs(want).max()), (what, error, allowed)
