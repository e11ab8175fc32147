"""Train steps on eight host devices against one: the program of `test_devices.py`.

    python -m tests.training.devices

prints one JSON object: of every comparison how far the devices are from one, as `far` says. Compiling is what takes the
time: one process does all, and what is said of optimizers is said of a loss without a model.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llm import sharding
from llm.models import build
from llm.models.gpt import GPTSpec
from llm.sharding import MeshSpec
from llm.training import losses, optimizer, replay, state
from llm.training.spec import OptimizerSpec
from llm.training.step import compile_train_step, put_batch
from tests.quick import options

ROWS, T = 16, 16
MESHES = {"data": {"data": 8}, "mixed": {"data": 2, "fsdp": 2, "tensor": 2}}
GPT = GPTSpec(vocab_size=32, context=T, layers=2, width=16, heads=4)
SPEC = OptimizerSpec(learning_rate=0.01, warmup_steps=0)


def on(devices: int, **axes) -> jax.sharding.Mesh:
    return sharding.make_mesh(MeshSpec(cpu_devices=8, **axes), jax.devices()[:devices])


def batch(seed: int, bad: bool = False) -> dict[str, np.ndarray]:
    """Rows of unlike length, every fourth without a token to train on; or one row, which one device has, of NaN."""
    rng = np.random.default_rng(seed)
    found = {name: rng.integers(0, 32, (ROWS, T)).astype(np.int32) for name in ("tokens", "targets")}
    found["segments"] = (np.arange(T) < rng.integers(1, T + 1, ROWS)[:, None]).astype(np.int32)
    found["weights"] = found["segments"].astype(np.float32)
    found["weights"][1::4] = 0  # the second of four micro-batches
    found["positions"] = np.tile(np.arange(T, dtype=np.int32), (ROWS, 1))
    if bad:
        found["weights"][6] = np.nan
    return found


def placed(fresh, places):
    """A copy of a state, which a step may take for its own."""
    return jax.device_put(jax.tree.map(jnp.copy, fresh), places)


class Run:
    """A train step and its state on a mesh."""

    def __init__(self, mesh, recipe, loss, spec=SPEC, microbatches=1, fresh=None, clip_norm: float | None = 1.0):
        places = state.state_shardings(recipe, mesh)
        self.mesh = mesh
        given = None if fresh is None else placed(fresh, places)
        with jax.set_mesh(mesh):
            self.state = state.create(recipe, mesh) if given is None else given
            step = compile_train_step(
                mesh, places, loss=loss, optimizer=recipe.optimizer, schedule=optimizer.schedule(spec, 10),
                clip_norm=clip_norm, microbatches=microbatches, ema_decay=recipe.ema_decay,
            )  # fmt: skip
            self.step = step.lower(self.state, put_batch(mesh, batch(0))).compile(options())

    def __call__(self, rows) -> list[float]:
        with jax.set_mesh(self.mesh):
            self.state, metrics = self.step(self.state, put_batch(self.mesh, rows))
        return [float(metrics[name]) for name in ("loss", "grad_norm", "skipped", "skipped_in_a_row")]

    def trees(self) -> dict[str, np.ndarray]:
        """What the optimizer and the average hold, and the parameters, on the host."""
        held = {"params": self.state.params, "opt_state": self.state.opt_state, "ema": self.state.ema}
        return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(held)}


def far(got: dict, want: dict) -> float:
    """The largest difference of an array, in units of its largest number, of all arrays."""
    assert got.keys() == want.keys() and all(np.isfinite(x).all() for x in want.values())
    return max(float(np.abs(got[name] - x).max() / max(np.abs(x).max(), 1e-30)) for name, x in want.items())


def steps_with_a_bad_one(one) -> dict:
    """Three steps with dropout, the second of NaN in one row; the state of a mesh is made on it."""
    model = build(dataclasses.replace(GPT, dropout=0.2))
    recipe, found = state.Recipe(model, optimizer.build(SPEC, 10)), {}
    meshes = {"one": one} | {name: on(8, **axes) for name, axes in MESHES.items()}
    for name, mesh in meshes.items():
        run = Run(mesh, recipe, losses.next_token(model, 8))
        rows = [run(batch(0)), run(batch(1, bad=True)), run(batch(2))]
        found[name] = rows, run.trees(), int(run.state.skipped)
    want = found.pop("one")
    sound = [row[:2] for row in (want[0][0], want[0][2])]
    return {
        name: {
            "metrics": float(np.abs(np.array([row[:2] for row in (rows[0], rows[2])]) / sound - 1).max()),
            "arrays": far(trees, want[1]),
            "skipped": [[[row[2:] for row in of], number] for of, number in ((rows, skipped), (want[0], want[2]))],
        }
        for name, (rows, trees, skipped) in found.items()
    }


def micro_batches(one) -> dict:
    """The gradient of a batch in one, two and four, in another order too; and a step of NaN after it."""
    model, mixed = build(GPT), on(8, **MESHES["mixed"])
    recipe = state.Recipe(model, optax.trace(0.0))  # its state is the gradient
    loss, found, kept = losses.next_token(model, None), {}, {}
    fresh, want = state.create(recipe, one), None
    order = np.random.default_rng(0).permutation(ROWS)
    cases = [("one", one, parts) for parts in (1, 2, 4)] + [("mixed", mixed, parts) for parts in (2, 4)]
    for name, mesh, parts in cases:
        run = Run(mesh, recipe, loss, microbatches=parts, fresh=fresh, clip_norm=None)
        first = run(batch(0))[0], run.trees()
        want = first if want is None else want
        skipped = run(batch(1, bad=True))[2:]
        kept[f"{name}, {parts}"] = [skipped, all(np.array_equal(x, first[1][k]) for k, x in run.trees().items())]
        run.state = placed(fresh, state.state_shardings(recipe, mesh))
        other = run({key: x[order] for key, x in batch(0).items()})[0], run.trees()
        for more, (value, trees) in {"": first, ", permuted": other}.items():
            found[f"{name}, {parts}{more}"] = [abs(value / want[0] - 1), far(trees, want[1])]
    return {"gradients": found, "kept": kept}


def optimizers(one) -> dict:
    """Two updates by each rule, of matrices large enough for Adafactor to factor their moments; Lion has an average."""
    model = build(GPTSpec(vocab_size=128, context=T, layers=2, width=128, heads=4, ff_width=128))
    found = {}

    def loss(params, rows, key):
        """Its gradient is another in every number of the parameters, and in every update."""
        del key
        waves = [jnp.sin(3 * x + jnp.arange(x.size).reshape(x.shape) % 7).sum() for x in jax.tree.leaves(params)]
        return {"loss": (sum(waves) * jnp.nansum(rows["weights"]), jnp.nansum(rows["weights"]))}

    for name in ("adafactor", "muon", "lion"):
        spec = dataclasses.replace(SPEC, name=name)
        recipe = state.Recipe(model, optimizer.build(spec, 10), ema_decay=0.9 if name == "lion" else None)
        fresh, ends = state.create(recipe, one), []
        for mesh in (one, on(8, **MESHES["mixed"])):
            run = Run(mesh, recipe, loss, spec, fresh=fresh)
            start = run.trees()
            for seed in range(2):
                run(batch(seed))
            ends.append(run.trees())
        moved = [not np.array_equal(x, start[key]) for key, x in ends[1].items()]
        found[name] = [far(ends[1], ends[0]), moved.count(True), len(moved)]
    return found


def replayed(one) -> list:
    """What a replay sees of each layer's modules where three layers are one piece of program, the second one broken."""
    model = build(dataclasses.replace(GPT, layers=3, unroll=3, attention="reference", dropout=0.2))
    recipe, seen = state.Recipe(model, optax.identity()), []
    fresh = state.create(recipe, one).params
    kernel = fresh["stack"]["layers"]["mlp"]["down"]
    kernel["kernel"] = kernel["kernel"].at[1, 3, 5].set(jnp.inf)
    for mesh in (one, on(8, **MESHES["mixed"])):
        with jax.set_mesh(mesh):
            params = jax.device_put(fresh, state.state_shardings(recipe, mesh).params)
            look = replay.looked_at(losses.next_token(model, None))
            seen.append(look(params, put_batch(mesh, batch(0)), jax.random.key(0))[1])
    return seen


def main() -> None:
    """Prints all comparisons."""
    sharding.request_cpu_devices(MeshSpec(cpu_devices=8))
    one = on(1)
    parts = (steps_with_a_bad_one, micro_batches, optimizers, replayed)
    print(json.dumps({part.__name__: part(one) for part in parts}))


if __name__ == "__main__":
    main()
