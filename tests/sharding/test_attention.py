"""Attention split over a mesh gives the output and gradients of one device, dropout and all (float32, jitted)."""

import subprocess
import sys

import pytest

from tests.helpers import ROOT, environment

PROGRAM = """
import importlib, sys
import jax, jax.numpy as jnp, numpy as np
from llm import sharding
from llm.attention import BucketBias, Mask, attention
from llm.sharding import MeshSpec

spec = MeshSpec(cpu_devices=8, data=2, fsdp=1, tensor=2, context=2)
sharding.request_cpu_devices(spec)
mesh = sharding.make_mesh(spec)
kind, B, T, S, N, K, H = sys.argv[1], *map(int, sys.argv[2:])
rng = np.random.default_rng(0)
normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
q, k, v, dout = normal(B, T, N, H), normal(B, S, K, H), normal(B, S, K, H), normal(B, T, N, H)
mask = Mask(
    causal=True, window=(9, None), q_segments_BT=jnp.asarray(rng.integers(0, 3, (B, T))),
    kv_segments_BS=jnp.asarray(rng.integers(0, 3, (B, S))), kv_positions_BS=jnp.tile(jnp.arange(S)[::-1], (B, 1)),
    kv_lengths_B=jnp.arange(B) + S // 2, prefix_lengths_B=jnp.arange(B),
    dense_BNTS=jnp.asarray(rng.random((B, N, T, S)) > 0.2),
)
dropout_offset = (jnp.int32(7), 2)
trained = {"sinks_N": normal(N), "bias": {
    "array": normal(1, N, T, S), "rows": normal(B, 1, T, S), "one": normal(1, 1, 1, S),
    "table": BucketBias(normal(8, N)),
}[kind]}
held = set()  # the shapes that one device attends over
on_mesh = importlib.import_module("llm.sharding.attention")

def recording(q, k, v, **more):
    held.add((*q.shape[:3], k.shape[2]))
    return attention(q, k, v, **more)

on_mesh.local_attention = recording
how = dict(dropout_offset=dropout_offset, dropout_rate=0.3, dropout_key=jax.random.key(3), softcap=3.0)

def run(function, mask, q, k, v, trained):
    f = lambda q, k, v, trained: function(q, k, v, mask=mask, return_lse=True, **trained, **how)
    only_out = function(q, k, v, mask=mask, **trained, **how)
    (out, lse), pull = jax.vjp(f, q, k, v, trained)
    return out, only_out, lse, pull((dout, jnp.where(jnp.isfinite(lse), 1.0, 0.0)))

want = jax.device_get(jax.jit(lambda *a: run(attention, *a))(mask, q, k, v, trained))
with jax.set_mesh(mesh):
    compiled = jax.jit(lambda *a: run(sharding.attention, *a)).lower(mask, q, k, v, trained).compile()
    got = jax.device_get(compiled(*jax.device_put((mask, q, k, v, trained), compiled.input_shardings[0])))
for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want)):
    np.testing.assert_allclose(a, b, atol=2e-5, err_msg=jax.tree_util.keystr(path))
assert float(jnp.abs(want[0]).max()) > 0.1
print("same", len(jax.tree.leaves(want)), *held)
"""


@pytest.mark.parametrize(
    "kind, sizes, held",
    [
        ("array", (4, 6, 10, 8, 4, 5), (2, 6, 4, 2)),
        pytest.param("rows", (4, 6, 10, 8, 4, 5), (2, 6, 4, 2), marks=pytest.mark.long),
        ("one", (3, 6, 10, 8, 4, 5), (3, 6, 4, 2)),  # rows that do not divide are attended to by every device
        ("table", (4, 6, 10, 6, 3, 5), (2, 6, 6, 3)),  # nor do these heads
        pytest.param("table", (2, 6, 10, 8, 4, 5), (1, 6, 4, 2), marks=pytest.mark.long),
    ],
)
def test_a_mesh_gives_what_one_device_gives(kind, sizes, held):
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, kind, *map(str, sizes)],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.strip() == f"same 8 {held}"
