"""Generation over a mesh of rows and heads is generation on one device (4 host devices)."""

import subprocess
import sys

from tests.helpers import ROOT, environment

PROGRAM = """
import flax.linen as nn, jax, jax.numpy as jnp, numpy as np
from llm import sharding
from llm.generation import SamplingSpec
from llm.generation.beam import beam_search
from llm.generation.continuous import ContinuousBatch, Request
from llm.generation.speculative import Lookup, speculate
from llm.models import GPTSpec, build
from llm.sharding import MeshSpec

spec = MeshSpec(cpu_devices=4, data=2, tensor=2)
sharding.request_cpu_devices(spec)
mesh = sharding.make_mesh(spec)
model = build(GPTSpec(vocab_size=32, context=24, layers=2, width=16, heads=4, kv_heads=2, ff_width=16, windows=(3,),
                      attention="reference"))
read = lambda m: m.unembed(m({"tokens": jnp.zeros((1, 1), jnp.int32)}).hidden_BTD)
boxed = jax.jit(lambda: model.init(jax.random.key(0), method=read))()["params"]
# A table as large as the kernels, which are doubled: attention is then neither flat nor a choice of one key.
params = jax.tree.map(lambda x: 2 * x, nn.unbox(boxed))
params["embed"]["table"] *= 10
# As a run's parameters lie: by their logical axes.
is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)
split = jax.tree.map(
    lambda box, x: jax.device_put(x, jax.sharding.NamedSharding(mesh, sharding.partition_spec(box.names))),
    boxed, params, is_leaf=is_box)
assert any(not x.is_fully_replicated for x in jax.tree.leaves(split))
prompts = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10, 1], [11], [1, 5]]
how = dict(vocab_size=32, end_of_text=7, chunk=8)

def everything(params):
    one = dict(how, context=24)
    yield [[b.tokens for b in row] for row in beam_search(model, params, prompts, 6, 3, **one)]
    batch = ContinuousBatch(model, params, SamplingSpec(1.0), slots=2, room=24, **how)
    yield sorted((n, c.tokens) for n, c in batch.run([Request(p, 7, seed=n) for n, p in enumerate(prompts)]))
    yield speculate(model, params, Lookup(), prompts, 9, SamplingSpec(0.0), ahead=3, **one)

want = list(everything(params))
with jax.set_mesh(mesh):
    for number, (found, alone) in enumerate(zip(everything(split), want, strict=True)):
        assert found == alone, (number, found, alone)
print("equal")
"""


def test_four_devices_write_what_one_does():
    """With beams, continuously and with guesses, each with a window's ring; plainly it is shown with evaluation."""
    result = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment(), capture_output=True,
                            text=True, timeout=300)  # fmt: skip
    assert result.returncode == 0 and "equal" in result.stdout, result.stderr
