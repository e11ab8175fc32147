"""Every family on eight host devices against one: the program of `test_equality.py`.

    python -m tests.sharding.equality gpt

prints a line for each mesh of a family: its axes, the relative difference of the loss, and the largest difference of
a gradient as a share of the largest gradient.
"""

import itertools
import json
import sys

import flax.linen as nn
import jax
import numpy as np
import optax
from jax.sharding import NamedSharding

from llm import models, sharding
from llm.models import BertSpec, ClassifierSpec, EncDecSpec, GPTSpec, RNNSpec, T5Spec
from llm.sharding import AXES, MeshSpec, partition_spec
from llm.training import losses
from llm.training.state import Recipe
from llm.training.step import put_batch
from tests.quick import options

V, B, T = 64, 8, 32
_SMALL = dict(vocab_size=V, layers=2, width=32, heads=8, ff_width=32, dropout=0.0, attention="reference")
_GPT = dict(**_SMALL, context=T, tied=False)
SINGLE = [{axis: 8} for axis in ("data", "fsdp", "tensor", "context")]
PAIRS = [{a: 4, b: 2} for a, b in itertools.combinations(AXES, 2)]
ALWAYS = [{"fsdp": 4, "tensor": 2}, {"context": 4, "expert": 2}]
TOGETHER = [{"fsdp": 2, "tensor": 2, "context": 2}]
ROWS = [{"data": 2, "fsdp": 2, "tensor": 2}]  # rows lie on two axes, of which one splits the parameters too
_OTHERS: dict[str, tuple[models.ModelSpec, str, list[dict[str, int]]]] = {
    "classifier": (ClassifierSpec(**_SMALL, context=T, classes=2), "classification", TOGETHER),
    "encdec": (EncDecSpec(**_SMALL, attention_dropout=0.0), "seq2seq", TOGETHER),
    "bert": (BertSpec(**_SMALL, attention_dropout=0.0, context=T), "masked", TOGETHER),
    "t5": (T5Spec(**_SMALL, buckets=8, max_distance=10), "seq2seq", TOGETHER),
}
# A family's settings, its objective, and its meshes: the axes that split something in it together, for a GPT each alone
# and, with experts, in pairs.
FAMILIES = {
    "rnn": (RNNSpec(vocab_size=V, layers=2, width=32, dropout=0.0), "causal", [*SINGLE[:3], *ROWS]),
    **_OTHERS,
    "gpt": (GPTSpec(**_GPT), "causal", [*SINGLE, *ROWS]),
    "mixture": (GPTSpec(**_GPT, experts=8), "causal", [{"expert": 8}, *ALWAYS]),
    "mixture, the rest": (GPTSpec(**_GPT, experts=8), "causal", [pair for pair in PAIRS if pair not in ALWAYS]),
    **{f"{name}, the rest": (spec, objective, SINGLE) for name, (spec, objective, _) in _OTHERS.items()},
}


def batch(family: str) -> dict[str, np.ndarray]:
    """Two documents and padding in every row, and what the objectives need."""
    rng, name = np.random.default_rng(0), family.partition(",")[0]
    draw = lambda: rng.integers(0, V, (B, T))  # noqa: E731
    segments = np.sort(rng.integers(0, 3, (B, T)), axis=1)[:, ::-1]
    segments = np.where(segments == 0, 0, 3 - segments)
    row = {"tokens": draw(), "segments": segments, "positions": np.tile(np.arange(T), (B, 1))}
    row |= {"targets": draw(), "weights": (segments != 0).astype(np.float32)}
    if name in ("encdec", "t5"):
        row |= {f"source_{name}": row[name] for name in ("segments", "positions")} | {"source_tokens": draw()}
    elif name == "bert":
        row |= {"labels": rng.integers(0, 2, B), "label_weights": np.ones(B, np.float32), "types": draw() % 2}
    elif name == "classifier":
        row |= {"labels": rng.integers(0, 2, B), "weights": np.ones(B, np.float32)}
    return {name: x.astype(np.float32 if x.dtype.kind == "f" else np.int32) for name, x in row.items()}


def main(family: str) -> None:
    """Prints a line for each mesh of the family."""
    sharding.request_cpu_devices(MeshSpec(cpu_devices=8))
    spec, objective, meshes = FAMILIES[family]
    model, host = models.build(spec), batch(family)
    recipe = Recipe(model, optax.identity(), objective)
    settings = losses.Settings(balance_weight=0.1, router_z_weight=0.01)
    loss = losses.sums(model, objective, settings)

    def mean(params, batch):
        total, weight = loss(params, batch, jax.random.key(1))["loss"]
        return total / weight

    def run(params, batch):
        compiled = jax.jit(jax.value_and_grad(mean), compiler_options=options())
        return jax.device_get(compiled(params, batch))

    boxed = recipe.boxed().params
    rng, shapes = np.random.default_rng(1), nn.unbox(boxed)
    # Tables and kernels alike in size: attention is then neither flat nor a choice of one key.
    params = jax.tree.map_with_path(
        lambda path, x: np.float32((path[-1].key == "scale") + 0.2 * rng.normal(size=x.shape)), shapes
    )
    want_loss, want = run(params, host)
    largest = max(float(np.abs(x).max()) for x in jax.tree.leaves(want))
    for sizes in meshes:
        mesh = sharding.make_mesh(MeshSpec(cpu_devices=8, **{"data": 1} | sizes))
        with jax.set_mesh(mesh):
            placed = jax.tree.map(
                lambda box, x: jax.device_put(x, NamedSharding(mesh, partition_spec(box.names))),  # noqa: B023
                boxed, params, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned),
            )  # fmt: skip
            got_loss, got = run(placed, put_batch(mesh, host))
        off = [float(np.abs(a - b).max()) for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)]
        print(json.dumps([sizes, abs(float(got_loss / want_loss) - 1), max(off) / largest]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
