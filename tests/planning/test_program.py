"""The compiled step's figures against a real run on eight host devices, and against counts by hand."""

import json
import subprocess
import sys

import pytest

from tests.helpers import ROOT, environment

# A GPT of three layers over fsdp=8: what it plans, then the real thing. The loop's step is compiled anew and run.
PROGRAM = """
import dataclasses, json, sys
import jax, numpy as np
from llm import config
from llm.planning import batch, page, program, topology
from llm.training import loop, state
from llm.training.step import put_batch

wanted = {
    "model.dropout": "0", "model.layers": "3", "model.vocab_size": "304", "training.microbatches": "1",
    "training.batch_size": "16", "mesh.data": "1", "mesh.fsdp": "8", "training.loss_chunk": sys.argv[1],
}
e = config.resolve(config.override(config.load("tests/tiny.py"), list(wanted.items())))
there = topology.make("cpu:8")
plan = program.compile_program(e, there)
found = page.figures(e, plan, 1e6)

given = program.abstract(e, there)
row = batch.made_up_row(e, 304)
with jax.set_mesh(given.mesh):
    real = state.create(given.made_of, given.mesh)
    rows = put_batch(given.mesh, {k: np.repeat(x, 16, axis=0) for k, x in row.items()})
    step = loop.build_step(given.made_of, e.training, e.optimizer, e.objective, given.mesh)
    compiled = step.lower(real, rows).compile()
    # A key is an array of its own kind: its words are what a device holds.
    held = jax.tree.map(lambda x: jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x, (real, rows))
    on_first = sum(s.data.nbytes for x in jax.tree.leaves(held) for s in x.addressable_shards if s.device.id == 0)
    memory = compiled.memory_analysis()
    _, metrics = compiled(real, rows)
# And the plan over two axes, as XLA's own attention is split.
other = {"mesh.fsdp": "4", "mesh.tensor": "2", "model.attention": "reference"} if sys.argv[1] == "none" else {}
e = config.resolve(config.override(config.load("tests/tiny.py"), list((wanted | other).items())))
split = page.figures(e, program.compile_program(e, there), 1e6)["sent_per_device"] if other else None
print(json.dumps({
    "figures": found, "split": split, "arguments": on_first, "temporaries": memory.temp_size_in_bytes, "loss": float(metrics["loss"]),
    "tokens": float(metrics["tokens"]), "parameters": state.count_parameters(real.params),
}))
"""  # noqa: E501


def run(loss_chunk):
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(loss_chunk)],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def whole():
    return run("none")


def sent(result, kind):
    return sum(row["bytes"] for row in result["figures"]["sent_per_device"] if row["kind"] == kind)


# Bytes of one layer's matrices and norms, and of the token table, in float32.
QUERY, KEY, VALUE, OUTPUT, UP, DOWN = 32 * 32, 32 * 16, 32 * 16, 32 * 32, 32 * 128, 128 * 32
MATRICES, NORMS, TABLE = 4 * (QUERY + KEY + VALUE + OUTPUT + UP + DOWN), 4 * 2 * 32, 4 * 304 * 32


def test_memory_is_that_of_the_real_run(whole):
    memory = whole["figures"]["memory_per_device"]
    assert memory["arguments"] == whole["arguments"]
    # The same compiler says both: the plan is of the program that runs. That the size is right is a test of its own.
    assert memory["temporaries"] == whole["temporaries"]
    # Parameters and two moments of each; an eighth, but for norms, which lie on all.
    norms = 3 * NORMS + 4 * 32
    of_state = 3 * ((3 * MATRICES + TABLE) / 8 + norms) + 2 * 4  # and the optimizer's two counters
    assert memory["state"] == of_state
    assert memory["peak"] == sum(memory[k] for k in ("arguments", "temporaries", "outputs")) - memory["aliased"]
    assert whole["figures"]["parameters"] == whole["parameters"] == (3 * MATRICES + TABLE + norms) / 4
    assert whole["figures"]["tokens"] == whole["tokens"] == 16 * 32


def test_temporaries_hold_what_the_backward_pass_needs(whole):
    """Of a device's two rows: of each layer what its six products take in, and the logits; and not many times that."""
    rows = 4 * 2 * 32
    queries, keys, hidden = 4 * 8, 2 * 8, 128
    a_layer = rows * (32 + queries + 2 * keys + queries + 32 + hidden)
    kept = 3 * a_layer + rows * 304
    assert kept < whole["figures"]["memory_per_device"]["temporaries"] < 8 * kept


def test_tensor_parallel_layers_sum_their_activations(whole):
    """fsdp=4, tensor=2: a device has four rows, half of each matrix, and of that a quarter at rest."""

    def on(kind, axes):
        return sum(row["bytes"] for row in whole["split"] if (row["kind"], row["axes"]) == (kind, axes))

    activations, places = 4 * 4 * 32 * 32, 4 * 4 * 32
    assert on("all-gather", ["fsdp"]) == 3 / 4 * (2 * 3 * MATRICES + TABLE) / 2 + places  # and the ids
    gradients = 2 * 3 / 4 * (3 * (MATRICES / 2 + NORMS) + TABLE / 2 + 4 * 32)
    assert gradients <= on("all-reduce", ["fsdp"]) < gradients + 200
    # A sum over two sends what it sums. Forward behind attention and mlp; backward before the mlp, and before each of
    # queries, keys and values; behind the table and before it; of every place the largest logit, the sum and the
    # target's; and the gradient of the looked up table, which lies by its width.
    sums = 3 * (2 + 1 + 3) * activations + 2 * activations + 3 * places + TABLE / 4
    assert sums <= on("all-reduce", ["tensor"]) < sums + 200
    # What is looked up by width is turned into rows, and its gradient back.
    assert on("all-to-all", ["fsdp"]) == 2 * 3 / 4 * activations


def test_parameters_are_gathered_and_gradients_reduced(whole):
    """Each layer's matrices are gathered forward and backward, the table once; gradients are summed once."""
    ids = 4 * 16 * 32
    assert sent(whole, "all-gather") == 7 / 8 * (2 * 3 * MATRICES + TABLE + ids)
    gradients = 2 * 7 / 8 * (3 * (MATRICES + NORMS) + TABLE + 4 * 32)
    assert gradients <= sent(whole, "all-reduce") < gradients + 200  # and some numbers: loss, weight, norm
    assert all(row["axes"] == ["fsdp"] for row in whole["figures"]["sent_per_device"])


def test_flops_are_those_of_a_count_by_hand(whole):
    a_token = (
        2 * (3 * MATRICES + TABLE + 3 * NORMS + 4 * 32) / 4 + 3 * 4 * 4 * 8 * 32
    )  # products; 3 layers, 4 heads of 8
    assert whole["figures"]["flops"] == 3 * a_token * 16 * 32


@pytest.mark.long
def test_chunks_of_the_loss_send_the_table_and_no_logits(whole):
    """Eight chunks of 64 tokens: the table is gathered and its gradient reduced for each, and the loss is the same."""
    chunked = run(64)
    assert chunked["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    more = sent(chunked, "all-gather") - sent(whole, "all-gather")
    assert more == pytest.approx(8 * 7 / 8 * TABLE, abs=7 * TABLE / 8)
    more = sent(chunked, "all-reduce") - sent(whole, "all-reduce")
    assert more == pytest.approx(7 * 2 * 7 / 8 * TABLE, abs=300)
