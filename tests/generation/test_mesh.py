"""Generation over a mesh of rows and heads is generation on one device (4 host devices)."""

import subprocess
import sys

import pytest

from tests.helpers import ROOT, environment

PROGRAM = '''
import flax.linen as nn, jax, jax.numpy as jnp
from llm import sharding
from llm.generation import SamplingSpec, complete
from llm.generation.beam import beam_search
from llm.generation.continuous import ContinuousBatch, Request
from llm.generation.speculative import Lookup, speculate
from llm.models import GPTSpec, RNNSpec, T5Spec, build
from llm.sharding import MeshSpec

spec = MeshSpec(cpu_devices=4, data=2, tensor=2)
sharding.request_cpu_devices(spec)
mesh = sharding.make_mesh(spec)
is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)

def made(spec):
    """A model, its parameters, and the same as a run's parameters lie: by their logical axes."""
    model, one = build(spec), jnp.zeros((1, 1), jnp.int32)
    read = lambda m: m.unembed(m({"tokens": one, "source_tokens": one}).hidden_BTD)
    boxed = jax.jit(lambda: model.init(jax.random.key(0), method=read))()["params"]
    # A table as large as the kernels, which are doubled: attention is then neither flat nor a choice of one key.
    params = jax.tree.map(lambda x: 2 * x, nn.unbox(boxed))
    params["embed"]["table"] *= 1 if isinstance(spec, T5Spec) else 10
    split = jax.tree.map(
        lambda box, x: jax.device_put(x, jax.sharding.NamedSharding(mesh, sharding.partition_spec(box.names))),
        boxed, params, is_leaf=is_box)
    assert any(not x.is_fully_replicated for x in jax.tree.leaves(split))
    return model, params, split

small = dict(vocab_size=32, width=16, heads=4, ff_width=16, attention="reference")
gpt = made(GPTSpec(**small, context=24, layers=2, kv_heads=2, windows=(3,)))
others = made(T5Spec(**small, layers=1)), made(RNNSpec(vocab_size=32, width=16, layers=1))
prompts = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10, 1], [11], [1, 5]]
how = dict(vocab_size=32, end_of_text=7, chunk=8)
drawn = SamplingSpec(1.0)

def everything(which):
    one, model, params = dict(how, context=24), gpt[0], gpt[which]
    yield [[b.tokens for b in row] for row in beam_search(model, params, prompts, 6, 3, **one)]
    batch = ContinuousBatch(model, params, drawn, slots=2, room=24, **how)
    yield sorted((n, c.tokens) for n, c in batch.run([Request(p, 7, seed=n) for n, p in enumerate(prompts)]))
    yield speculate(model, params, Lookup(), prompts, 9, SamplingSpec(0.0), ahead=3, **one)
    for model, *of in (gpt, *others):
        source = {"sources": prompts[::-1]} if model.reads_source else {}
        yield complete(model, of[which - 1], prompts, 7, drawn, **one, **source)

want = list(everything(1))
assert all(len({str(row) for row in rows}) == 4 for rows in want), want
with jax.set_mesh(mesh):
    for number, (found, alone) in enumerate(zip(everything(2), want, strict=True)):
        assert found == alone, (number, found, alone)
print("equal")
'''


@pytest.mark.long
def test_four_devices_write_what_one_does():
    """A window's ring with beams, continuously, with guesses and plainly; a T5 and a state plainly."""
    result = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment(), capture_output=True,
                            text=True, timeout=300)  # fmt: skip
    assert result.returncode == 0 and "equal" in result.stdout, result.stderr
