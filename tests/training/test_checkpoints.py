"""Checkpoints: which stay, what they are restored onto, what is told of them, and writes that fail."""

import json
import re
import resource
import shutil
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest

from llm.errors import InputError
from llm.training.checkpoint import Checkpoints, Retention
from tests.helpers import ROOT, assert_refused, assert_refused_last, command, environment, tiny, verb

OTHER_MESHES = """
import dataclasses, pathlib, sys
import jax, jax.numpy as jnp, numpy as np
from llm import sharding
from llm.data import batch_at
from llm.errors import InputError
from llm.models import build
from llm.models.gpt import GPTSpec
from llm.sharding import MeshSpec
from llm.training import losses, optimizer, state
from llm.training.checkpoint import Checkpoints
from llm.training.spec import OptimizerSpec
from llm.training.step import compile_train_step, put_batch
from tests.data.test_loader import packed
from tests.quick import options

sharding.request_cpu_devices(MeshSpec(cpu_devices=8))
model = build(GPTSpec(vocab_size=32, context=16, layers=2, width=16, heads=4, dropout=0.2, attention="reference"))
recipe = state.Recipe(model, optimizer.build(OptimizerSpec(), 200))

def on(devices, **axes):
    return sharding.make_mesh(MeshSpec(cpu_devices=8, **axes), jax.devices()[:devices])

def value(x):
    return np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)

def values(tree):
    return {jax.tree_util.keystr(path): value(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}

first = on(8, data=1, fsdp=4, tensor=2)
saved = state.saved(state.create(recipe, first))
# Moments that differ from their fresh zeros, each where it lies.
saved["opt_state"] = jax.tree.map(lambda x: x + jnp.arange(x.size, dtype=x.dtype).reshape(x.shape), saved["opt_state"])
checkpoints = Checkpoints(pathlib.Path(sys.argv[1]) / "checkpoints", 1)
checkpoints.save(3, saved, fingerprints={})
checkpoints.wait()
want = values(saved)
for mesh in (first, on(2, data=2), on(1), on(8, data=2, fsdp=2, tensor=2)):
    target = state.saved(state.abstract(recipe, mesh))
    found = checkpoints.restore(3, target)
    for name, got in values(found).items():
        np.testing.assert_array_equal(got, want[name], err_msg=name)
    for x, asked in zip(jax.tree.leaves(found), jax.tree.leaves(target)):
        assert x.sharding.is_equivalent_to(asked.sharding, x.ndim), (x.sharding, asked.sharding)
        assert x.sharding.device_set == set(mesh.devices.flat)
params = state.abstract(recipe, on(2, data=2)).params
half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=x.sharding), params)
for name, got in values(checkpoints.restore_part(3, {"params": half})).items():
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, want[name].astype(jnp.bfloat16))
wider = state.Recipe(build(GPTSpec(vocab_size=32, context=16, layers=2, width=32, heads=4)), recipe.optimizer)
try:
    checkpoints.restore(3, state.saved(state.abstract(wider, on(1))))
except InputError as error:
    assert "does not fit this model" in str(error)
else:
    raise AssertionError("another shape was restored")

# Six steps, and three, a checkpoint and three: rows shuffled over epochs of 11, dropout, two micro-batches.
data, spec = packed(pathlib.Path(sys.argv[1]), row_length=8), OptimizerSpec()

def batch(n):
    return batch_at(data, 0, n, 8)

def step_on(mesh):
    step = compile_train_step(
        mesh, state.state_shardings(recipe, mesh), loss=losses.next_token(model, None), optimizer=recipe.optimizer,
        schedule=optimizer.schedule(spec, 200), clip_norm=1.0, microbatches=2,
    )
    return step.lower(state.abstract(recipe, mesh), put_batch(mesh, batch(0))).compile(options())

def steps(mesh, step, s, numbers):
    losses = []
    for n in numbers:
        s, metrics = step(s, put_batch(mesh, batch(n)))
        losses.append(float(metrics["loss"]))
    return s, losses

def restored(mesh):
    return state.TrainState(**checkpoints.restore(6, state.saved(state.abstract(recipe, mesh))))

with jax.set_mesh(first):
    step = step_on(first)
    s, losses_begun = steps(first, step, state.create(recipe, first), range(3))
    checkpoints.save(6, state.saved(s), fingerprints={})
    checkpoints.wait()
    straight, want = steps(first, step, s, range(3, 6))
    resumed, again = steps(first, step, restored(first), range(3, 6))
assert again == want, (again, want)
for (name, x), y in zip(values(straight).items(), values(resumed).values(), strict=True):
    np.testing.assert_array_equal(x, y, err_msg=name)
assert len(set(losses_begun + want)) == 6
for mesh in (on(4, data=2, fsdp=2), on(1)):
    with jax.set_mesh(mesh):
        _, (loss,) = steps(mesh, step_on(mesh), restored(mesh), [3])
    np.testing.assert_allclose(loss, want[0], rtol=1e-5)
print("all equal")
"""


@pytest.mark.long
def test_another_mesh_and_another_dtype(tmp_path):
    """8 devices (fsdp 4, tensor 2) -> 2, 1, and 8 another way; parameters in bfloat16; another shape is refused.

    And a run goes on from one: bit-equal on as many devices, with the same next loss on 4 and on 1.
    """
    result = subprocess.run(
        [sys.executable, "-c", OTHER_MESHES, str(tmp_path)],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=580,
    )  # fmt: skip
    assert result.returncode == 0 and result.stdout.splitlines()[-1] == "all equal", result.stderr


def test_what_does_not_fit_is_named_and_casts_are_said(tmp_path):
    said = []
    checkpoints = Checkpoints(tmp_path / "checkpoints", 1, said.append)

    def tree(**shapes):
        return {"params": {name: jnp.ones(shape) for name, shape in shapes.items()}, "step": jnp.zeros((), jnp.int32)}

    checkpoints.save(3, tree(a=(2, 3), b=(4,)), fingerprints={})
    checkpoints.wait()
    for target, faults in {
        "lacks": (tree(a=(2, 3), b=(4,), c=(1,)), "it lacks params/c; "),
        "beside": (tree(a=(2, 3)), "it has beside params/b; "),
        "shape": (tree(a=(3, 2), b=(4,)), "of another shape is params/a (saved 2x3, wanted 3x2); "),
        "all": (
            tree(a=(3,), **dict.fromkeys("cdefg", (1,))),
            "it lacks params/c, params/d, params/e and 2 more; it has beside params/b; of another shape is params/a (",
        ),
    }.values():
        with pytest.raises(InputError) as refused:
            checkpoints.restore(3, target)
        text = str(refused.value)
        assert f"{tmp_path / 'checkpoints' / '3'} does not fit this model: {faults}" in text and "\n" not in text, text
        assert "give the config that it was saved with" in text
    for part, fault in ((tree(c=(1,)), "it lacks params/c"), (tree(a=(9,)), "params/a (saved 2x3, wanted 9)")):
        with pytest.raises(InputError, match=re.escape(fault)):
            checkpoints.restore_part(3, {"params": part["params"]})
    assert said == []
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree(a=(2, 3), b=(4,))["params"])
    for _ in range(2):
        found = checkpoints.restore_part(3, {"params": half})["params"]
        assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype(jnp.bfloat16)}
    assert said == ["checkpoint 3 is cast: params/a, params/b from float32 to bfloat16"]


def facts(**numbers):
    return {"metrics": {f"validation.{name}": value for name, value in numbers.items()}}


def test_which_checkpoints_stay():
    losses = {2: 5.0, 4: 3.0, 6: 4.0, 8: "nan", 10: 3.0, 12: 9.0}
    saved = {step: facts(loss=loss, accuracy=loss) for step, loss in losses.items()} | {
        14: {}
    }  # 14 of an older version
    assert Retention(2).stay(saved) == {12, 14}
    assert Retention(1, every=6).stay(saved) == {6, 12, 14}
    assert Retention(1, best="loss").stay(saved) == {4, 14}  # the first of equals; no number counts as none
    assert Retention(1, best="accuracy").stay(saved) == {12, 14}
    assert Retention(3, 4, "loss").stay(saved) == {4, 8, 10, 12, 14}
    assert Retention(2).stay({}) == set() and Retention(1, best="loss").best_step({14: {}}) is None


@pytest.mark.long
def test_a_run_keeps_by_step_and_score_and_says_what_it_has(corpus, tmp_path):
    workdir = tmp_path / "run"
    arguments = tiny(
        corpus, workdir, "training.steps=24", "training.validate_every=3", "training.keep_checkpoints=1",
        "training.keep_every=8", "training.keep_best=loss", "optimizer.learning_rate=0.3", "optimizer.warmup_steps=20",
    )  # fmt: skip
    result = verb("train", *arguments)
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    validated = {row["step"]: row["validation.loss"] for row in rows if "validation.loss" in row}
    best = min(validated, key=lambda step: validated[step])
    assert best > 3 and best % 4, validated  # nothing but its score saves and keeps it
    assert {int(p.name) for p in (workdir / "checkpoints").iterdir()} == {8, 16, 24, best}

    broken = workdir / "checkpoints" / "16" / "manifest.json"
    broken.rename(broken.with_suffix(".away"))
    # No such platform: whoever touches a device fails.
    page = verb("train", f"--workdir={workdir}", "--inspect", JAX_PLATFORMS="none")
    assert page.returncode == 0 and page.stderr == "", page.stderr
    lines = page.stdout.splitlines()
    (told,) = [line for line in lines if line.split()[:1] == [str(best)]]
    assert "complete, loss" in told and f"validation.loss {validated[best]:.5g}" in told
    assert any(line.split()[:1] == ["16"] and "it has no manifest.json" in line for line in lines)
    summary = json.loads((workdir / "summary.json").read_text())
    (parameters,) = [line for line in lines if line.startswith("params of 24: ")]
    assert parameters.endswith(f" {summary['parameters']:,} numbers")
    (table,) = [line for line in lines if line.split()[:1] == ["params/embed/table"]]
    assert table.split()[1:3] == ["300x32", "float32"]
    assert any(line.startswith("  opt_state/") and "mu/embed/table" in line for line in lines)
    assert f"tokens: {summary['train_tokens']}" in lines

    config = json.loads((workdir / "config.json").read_text())
    config["mesh"]["fsdp"] = 8
    (workdir / "config.json").write_text(json.dumps(config))  # as from a machine with eight devices
    for flag, step in (("--checkpoint=best", best), ("--checkpoint=8", 8)):
        result = verb("evaluate", f"--workdir={workdir}", flag)
        assert result.returncode == 0 and json.loads((workdir / "evaluation.json").read_text())["step"] == step
        assert "fsdp=8" in result.stderr and "each of the 1 here takes the whole model" in result.stderr
    assert_refused_last(
        verb("evaluate", f"--workdir={workdir}", "--checkpoint=16"), "no complete checkpoint of step 16"
    )
    assert_refused(verb("train", "--inspect"), "--inspect goes with --workdir alone")
    assert_refused(verb("train", "--inspect", "--profile=1:2"), "--inspect and --profile do not go together")
    taken_in = verb("convert", "--from=x", f"--workdir={tmp_path / 'x'}", "--checkpoint=best")
    assert_refused(taken_in, "--checkpoint=best goes with --to")
    assert_refused(verb("train", f"--workdir={tmp_path}", "--inspect"), "holds no checkpoints")


@pytest.mark.parametrize(
    "override, part",
    [
        ("training.keep_every=6", "must be a multiple of training.checkpoint_every=4"),
        ("training.keep_best=bleu", "there are 'loss', 'accuracy'"),
        ("training.keep_best=accuracy", "objective.kind='causal' has none"),
    ],
)
def test_retention_that_keeps_nothing(corpus, tmp_path, override, part):
    assert_refused(verb("train", *tiny(corpus, tmp_path / "run", override)), part)


def start(arguments):
    return subprocess.Popen(
        command("train", *arguments), cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


def wait_until(condition, process):
    deadline = time.time() + 280
    while not condition():
        assert process.poll() is None and time.time() < deadline, process.communicate()[1]
        time.sleep(0.005)


def limited(process, size):
    """From here on no file of the process may grow beyond `size` bytes: its writes fail with EFBIG."""
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@pytest.mark.long
def test_writes_that_fail_end_the_run_in_one_line_and_lose_nothing(corpus, tmp_path):
    """First those of a checkpoint, in the background; then a row of metrics.jsonl; then the same command finishes."""
    workdir = tmp_path / "run"
    arguments = tiny(
        corpus, workdir, "training.steps=600", "training.log_every=100", "training.validate_every=600",
        "training.checkpoint_every=200",
    )  # fmt: skip
    checkpoints, log = workdir / "checkpoints", workdir / "metrics.jsonl"
    process = start(arguments)
    wait_until((checkpoints / "200" / "manifest.json").is_file, process)
    limited(process, 20_000)  # more than metrics.jsonl will have
    _, stderr = process.communicate(timeout=280)
    assert process.returncode == 2 and "Traceback" not in stderr, stderr
    assert stderr.splitlines()[-1].startswith("error: cannot write"), stderr
    assert not (checkpoints / "400" / "manifest.json").exists()

    process = start(arguments)
    wait_until(lambda: log.read_text().count("\n") == 2, process)  # the rows up to 200: it has resumed
    wait_until(lambda: list((workdir / "tensorboard").glob(f"*.{process.pid}")), process)
    limited(process, log.stat().st_size + 10)
    stdout, stderr = process.communicate(timeout=280)
    assert "resuming at step 200" in stdout
    assert process.returncode == 2 and "Traceback" not in stderr, stderr
    assert stderr.splitlines()[-1].startswith("error: cannot write"), stderr

    shutil.move(checkpoints, tmp_path / "away")
    checkpoints.write_text("")
    assert_refused_last(verb("train", *arguments), f"{checkpoints} is a file, expected a folder")
    checkpoints.unlink()
    shutil.move(tmp_path / "away", checkpoints)
    result = verb("train", *arguments)
    assert result.returncode == 0 and "resuming at step 200" in result.stdout, result.stderr
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == list(range(100, 601, 100))
