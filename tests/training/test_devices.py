"""One device or eight: the same loss, gradient and update (float32, jitted, host devices, within 1e-5)."""

import json
import subprocess
import sys

import numpy as np
import pytest

from tests.helpers import ROOT, environment

PROGRAM = """
import json, sys
import jax, numpy as np
from llm import sharding
from llm.models import build
from llm.models.gpt import GPTSpec
from llm.sharding import MeshSpec
from llm.training import losses, optimizer, state
from llm.training.spec import OptimizerSpec
from llm.training.step import compile_train_step, put_batch

mesh_spec = MeshSpec(**json.loads(sys.argv[1]))
sharding.request_cpu_devices(mesh_spec)
mesh = sharding.make_mesh(mesh_spec)
model = build(GPTSpec(vocab_size=32, context=16, layers=2, width=16, heads=4, dropout=0.2))
spec = OptimizerSpec(learning_rate=0.01, warmup_steps=0)
opt = optimizer.build(spec, 10)
rng = np.random.default_rng(0)
batch = {k: rng.integers(0, 32, (8, 16)).astype(np.int32) for k in ("tokens", "targets")}
lengths = rng.integers(1, 17, 8)
batch["segments"] = (np.arange(16) < lengths[:, None]).astype(np.int32)
batch["weights"] = batch["segments"].astype(np.float32)
batch["positions"] = np.tile(np.arange(16, dtype=np.int32), (8, 1))
with jax.set_mesh(mesh):
    recipe = state.Recipe(model, opt)
    s = state.create(recipe, mesh)
    step = compile_train_step(
        mesh, state.state_shardings(recipe, mesh), loss=losses.next_token(model, 8), optimizer=opt,
        schedule=optimizer.schedule(spec, 10), clip_norm=1.0, microbatches=int(sys.argv[2]),
    )
    rows = []
    for _ in range(3):
        s, metrics = step(s, put_batch(mesh, batch))
        rows.append([float(metrics[k]) for k in ("loss", "grad_norm")])
print(json.dumps({"rows": rows, "checksum": [float(np.abs(x).sum()) for x in jax.tree.leaves(jax.device_get(s.params))],
                  "devices": jax.device_count()}))
"""


def run(microbatches=1, **mesh):
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(mesh), str(microbatches)],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def one_device():
    return run(cpu_devices=1)


@pytest.mark.parametrize("mesh", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_eight_devices_equal_one(one_device, mesh):
    many = run(cpu_devices=8, **mesh)
    assert many["devices"] == 8
    np.testing.assert_allclose(many["rows"], one_device["rows"], rtol=1e-5)
    np.testing.assert_allclose(many["checksum"], one_device["checksum"], rtol=1e-4)


def test_micro_batches_over_devices_equal_one_device():
    one, many = run(2, cpu_devices=1), run(2, cpu_devices=4, data=2, fsdp=2)
    np.testing.assert_allclose(many["rows"], one["rows"], rtol=1e-5)
    np.testing.assert_allclose(many["checksum"], one["checksum"], rtol=1e-4)
