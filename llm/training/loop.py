"""The training loop: batches in, updates, records, validations and checkpoints out."""

import collections
import dataclasses
import pathlib
import shutil
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from llm import models
from llm.data import ObjectiveSpec, Prepared, batch_at, prefetch
from llm.errors import InputError, RunFailed, Stopped
from llm.sharding import batch_shards, hosts
from llm.stop import stop_signal
from llm.training import losses
from llm.training import optimizer as optimizers
from llm.training import state as states
from llm.training.adapters import Adapters, without
from llm.training.checkpoint import Checkpoints, Retention
from llm.training.diagnostics import Diagnostics
from llm.training.metrics import MetricsLog
from llm.training.roles import path_name
from llm.training.spec import OptimizerSpec, TrainingSpec
from llm.training.step import STOP, compile_train_step, put_batch
from llm.training.watch import Profile, Watch
from llm.training.watch import say as warn


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """What the loop hands on: the final state, the model's parameters out of it (`Recipe.model_params`), the time and
    tokens of all its parts before and after resumes, the operations that those tokens took, their rate, and which share
    of which peak (MFU) that is; and of this process the first step, as `Watch` has it.
    """

    state: states.TrainState
    params: Any
    seconds: float
    tokens: int
    flops: float
    tokens_per_second: float
    mfu: float
    mfu_of: str
    first_step_seconds: float | None
    first_step_cached: bool | None


def recipe(
    model: models.Model, spec: TrainingSpec, optimizer_spec: OptimizerSpec, objective: ObjectiveSpec, seed: int
) -> states.Recipe:
    """What the state of a run is made of."""
    adapters = None
    if spec.lora_rank is not None:
        adapters = Adapters(spec.lora_rank, spec.lora_alpha, spec.lora_targets)
    optimizer = optimizers.build(trained_by(spec, optimizer_spec), spec.steps, models.width_share(model.spec))
    return states.Recipe(model, optimizer, objective.kind, seed, spec.batch_size, adapters, spec.ema_decay)


def trained_by(spec: TrainingSpec, optimizer_spec: OptimizerSpec) -> OptimizerSpec:
    """The optimizer's settings of a run: with adapters, everything else is frozen."""
    return optimizer_spec if spec.lora_rank is None else optimizers.of_adapters(optimizer_spec)


def loss_of(
    made_of: states.Recipe, spec: TrainingSpec, optimizer_spec: OptimizerSpec, objective: ObjectiveSpec
) -> Callable:
    """What a run minimises, as a function of all that its state has for parameters (`losses.build`)."""
    rates, whole_loss = trained_by(spec, optimizer_spec), losses.build(made_of.model, objective, spec)

    def loss(params, *arguments):
        params = optimizers.stop_frozen(rates, params)
        return whole_loss(params if made_of.adapters is None else made_of.adapters.merge(params), *arguments)

    return loss


def build_step(
    made_of: states.Recipe,
    spec: TrainingSpec,
    optimizer_spec: OptimizerSpec,
    objective: ObjectiveSpec,
    mesh: jax.sharding.Mesh,
) -> Callable:
    """THE train step of a run, jitted over the mesh: what the loop runs, and what `llm.planning` compiles."""
    return compile_train_step(
        mesh,
        states.state_shardings(made_of, mesh),
        loss=loss_of(made_of, spec, optimizer_spec, objective),
        optimizer=made_of.optimizer,
        schedule=optimizers.schedule(optimizer_spec, spec.steps),
        clip_norm=optimizer_spec.clip_norm,
        microbatches=spec.microbatches,
        ema_decay=spec.ema_decay,
    )


def train(
    model: models.Model,
    spec: TrainingSpec,
    optimizer_spec: OptimizerSpec,
    objective: ObjectiveSpec,
    prepared: Prepared,
    seed: int,
    mesh: jax.sharding.Mesh,
    workdir: pathlib.Path,
    validate: Callable[[object], dict[str, float]],
    initial: Callable[[object], object] = lambda params: params,
    say: Callable[[str], None] = print,
    profile: Profile | None = None,
    open_tracker: Callable[[], Any] = lambda: None,
) -> Trained:
    """Trains to `spec.steps` steps, from the newest complete checkpoint of `workdir` if it has one.

    Args:
        validate: f(the model's params) -> numbers by name, called every `validate_every` steps.
        initial: f(fresh parameters, with adapters) -> those that a new run starts from.
        profile: of which steps to write a trace.
        open_tracker: gives what the record is sent to as well, once the run begins; None is nothing.

    Raises:
        InputError: the checkpoint was made with other data, the disk has no room, or the profile is of no step to come.
        RunFailed: too many steps in a row had no finite gradient.
        Stopped: a stop signal came; the state is saved.
    """
    made_of = recipe(model, spec, optimizer_spec, objective, seed)
    target = states.abstract(made_of, mesh)
    checkpoints = Checkpoints(workdir / "checkpoints", retention(spec), say)
    fingerprints = {"data": prepared.fingerprint, "tokenizer": prepared.tokenizer.fingerprint}

    hosts.from_first(checkpoints.make_folder)
    start = checkpoints.latest()
    if start is None:
        _require_room(workdir, target, spec)
        state, seconds_before, tokens = states.create(made_of, mesh), 0.0, 0
        params = initial(state.params)
        state = dataclasses.replace(
            state, params=params, ema=None if state.ema is None else jax.tree.map(jnp.copy, params)
        )
        start = 0
    else:
        facts = checkpoints.facts(start)
        for name, value in fingerprints.items():
            if facts["fingerprints"][name] != value:
                raise InputError(
                    f"checkpoint {start} was trained on other {name} (fingerprint {facts['fingerprints'][name]}) than "
                    f"{workdir} holds now ({value}); restore the {name} or start a new workdir"
                )
        state = states.TrainState(**checkpoints.restore(start, states.saved(target)))
        seconds_before, tokens = facts["seconds"], facts["tokens"]
        say(f"resuming at step {start} of {spec.steps}")
    if profile is not None:
        profile.check(start, spec.steps)

    rates = trained_by(spec, optimizer_spec)
    if optimizers.freezes(rates):
        sizes = [(path_name(path), x.size) for path, x in jax.tree_util.tree_leaves_with_path(target.params)]
        trained = sum(size for name, size in sizes if optimizers.factor_of(name, rates))
        say(f"trained are {trained:,} of {sum(size for _, size in sizes):,} parameters; the others are frozen")

    step_function = build_step(made_of, spec, optimizer_spec, objective, mesh)

    mine = hosts.rows_here(mesh, spec.batch_size)

    def make(step: int) -> dict:
        return put_batch(mesh, batch_at(prepared.train, seed, step, spec.batch_size, mine), spec.batch_size)

    # The backward pass costs two forward ones.
    flops = 3 * model.flops_per_token(without(target.params), prepared.train.row_length)
    watch = Watch(step_function, flops, workdir, tokens, prepared.train.buckets, profile)
    diagnostics = Diagnostics(workdir, say)
    log = MetricsLog(workdir, start, open_tracker()) if hosts.first() else None
    began = time.perf_counter()

    def so_far() -> dict:
        seconds = seconds_before + time.perf_counter() - began
        return {"fingerprints": fingerprints, "seconds": seconds, "tokens": tokens}

    bar = tqdm(
        total=spec.steps, initial=start, desc="training", unit="step", mininterval=0.5, dynamic_ncols=True,
        disable=not hosts.first(),
    )  # fmt: skip
    pending: collections.deque[tuple[int, dict, dict]] = collections.deque()
    recorded: dict[str, float] = {}
    # After a step that was skipped none is under way while it is looked at, so that when the run fails the state is
    # the one that the last step failed on.
    waits = spec.max_skipped == 1

    def account() -> dict[str, float]:
        """Takes the oldest pending step into the record: its tokens, and whether it was skipped."""
        nonlocal tokens, waits
        done, batch, metrics = pending.popleft()
        metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
        watch.stepped()
        tokens += round(metrics["tokens"])
        bar.update()
        fails = metrics["skipped_in_a_row"] >= spec.max_skipped
        waits = bool(metrics["skipped"]) or spec.max_skipped == 1
        if metrics["skipped"]:
            where = diagnostics.save_batch(done, batch, metrics, always=fails)
            kept = "" if where is None else f"; its batch is in {where}"
            warn(f"step {done} is skipped: its loss or gradient is not finite{kept}")
        if fails:
            checkpoints.wait()
            diagnostics.save_state(done, states.saved(state), so_far())
            raise RunFailed(
                f"{spec.max_skipped} steps in a row had no finite gradient, the last is step {done}; its batch is in "
                f"{where}; the same command with --debug-nans says where it begins; lower optimizer.learning_rate, or "
                "look at the batch"
            )
        return metrics

    failed = True
    try:
        with stop_signal.deferred(), bar, watch:
            steps = range(start, spec.steps)
            for step, batch in watch.batches(steps, prefetch(make, steps)):
                before = state
                asked = {}
                if hosts.several():
                    wish = np.full(len(mine), stop_signal.requested, np.float32)
                    asked = put_batch(mesh, {STOP: wish}, spec.batch_size)
                state, metrics = step_function(state, batch | asked)
                done = step + 1
                watch.ran(done, before, batch, metrics)
                pending.append((done, batch, metrics))
                last = done == spec.steps
                # Several hosts agree by a number of the step: the newest that all have looked at.
                stopping = (recorded.get(STOP, 0) > 0 if hosts.several() else stop_signal.requested) and not last
                validating = done % spec.validate_every == 0 and not last
                saving = done % spec.checkpoint_every == 0 or last or stopping
                logging = done % spec.log_every == 0 or validating or last
                # The device works on this step while the host looks at the one before; a step that is looked at in any
                # other way is waited for.
                while len(pending) > (0 if logging or saving or waits else 1):
                    recorded = account()
                row: dict[str, float] = {"step": done}
                if logging:
                    row |= watch.row(tokens)
                    row |= {name: value for name, value in recorded.items() if name not in _COUNTS}
                    if validating:
                        with watch.aside():
                            scores = validate(made_of.model_params(state))
                        row |= {f"validation.{name}": value for name, value in scores.items()}
                    if log is not None:
                        log.write(row)
                    bar.set_postfix_str(f"loss {recorded['loss']:.3f}, {row['tokens_per_second']:,.0f} tokens/s")
                checkpoints.check()
                if saving or checkpoints.improves(row):
                    checkpoints.save(done, states.saved(state), **so_far(), metrics=row)
                if stopping:
                    with watch.last_save():
                        checkpoints.wait()
                    raise Stopped(f"saved step {done} of {spec.steps}; the same command goes on")
            with watch.last_save():
                checkpoints.wait()
            if stop_signal.requested:
                raise Stopped(f"saved the last step, {spec.steps}; the same command finishes the run")
        failed = False
    except Stopped:
        failed = False
        raise
    finally:
        if log is not None:
            log.close(failed)
    seconds = so_far()["seconds"]
    rate = tokens / max(seconds, 1e-9)  # the mean over the loop, compilation included
    done = made_of.model_params(state)
    return Trained(
        state, done, seconds, tokens, flops * tokens, rate, watch.mfu(rate), watch.peak[1], watch.first_step_seconds,
        watch.first_step_cached,
    )  # fmt: skip


_COUNTS = ("weight", "tokens", "skipped_in_a_row", STOP)  # of a step's metrics, what is no record


def check_batch(spec: TrainingSpec, mesh: jax.sharding.Mesh) -> None:
    """Raises InputError when the batch cannot be shared equally by micro-batches and devices."""
    shards = batch_shards(mesh)
    if spec.batch_size % (shards * spec.microbatches):
        raise InputError(
            f"training.batch_size={spec.batch_size} is not a multiple of the mesh's {shards} data shards times "
            f"training.microbatches={spec.microbatches}"
        )


def retention(spec: TrainingSpec) -> Retention:
    """Which checkpoints of a run stay."""
    return Retention(spec.keep_checkpoints, spec.keep_every, spec.keep_best)


def _require_room(workdir: pathlib.Path, target: states.TrainState, spec: TrainingSpec) -> None:
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((target.params, target.opt_state, target.ema)))
    forever = 0 if spec.keep_every is None else spec.steps // spec.keep_every
    count = spec.keep_checkpoints + forever + bool(spec.keep_best) + 1  # a new one stands before the oldest goes
    needed, free = size * count, shutil.disk_usage(workdir).free
    if free < needed:
        raise InputError(
            f"{workdir} has {free / 1e6:,.0f} MB free, {count} checkpoints of this model take "
            f"{needed / 1e6:,.0f} MB: make room, or lower training.keep_checkpoints"
            f"{' or raise training.keep_every' if forever else ''}"
        )
