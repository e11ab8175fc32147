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
from llm.sharding import batch_shards
from llm.stop import stop_signal
from llm.training import losses
from llm.training import optimizer as optimizers
from llm.training import state as states
from llm.training.adapters import Adapters
from llm.training.checkpoint import Checkpoints
from llm.training.metrics import MetricsLog
from llm.training.roles import path_name
from llm.training.spec import OptimizerSpec, TrainingSpec
from llm.training.step import compile_train_step, put_batch


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """What the loop hands on: the final state, the model's parameters out of it (`Recipe.model_params`), and the time
    and tokens of all its parts before and after resumes.
    """

    state: states.TrainState
    params: Any
    seconds: float
    tokens: int

    @property
    def tokens_per_second(self) -> float:
        """Mean over the loop, compilation included."""
        return self.tokens / max(self.seconds, 1e-9)


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


def build_step(
    made_of: states.Recipe,
    spec: TrainingSpec,
    optimizer_spec: OptimizerSpec,
    objective: ObjectiveSpec,
    mesh: jax.sharding.Mesh,
) -> Callable:
    """THE train step of a run, jitted over the mesh: what the loop runs, and what `llm.planning` compiles."""
    rates, whole_loss = trained_by(spec, optimizer_spec), losses.build(made_of.model, objective, spec)

    def loss(params, *arguments):
        params = optimizers.stop_frozen(rates, params)
        return whole_loss(params if made_of.adapters is None else made_of.adapters.merge(params), *arguments)

    return compile_train_step(
        mesh,
        states.state_shardings(made_of, mesh),
        loss=loss,
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
) -> Trained:
    """Trains to `spec.steps` steps, from the newest complete checkpoint of `workdir` if it has one.

    Args:
        validate: f(the model's params) -> numbers by name, called every `validate_every` steps.
        initial: f(fresh parameters, with adapters) -> those that a new run starts from.

    Raises:
        InputError: the checkpoint was made with other data, or the disk has no room.
        RunFailed: too many steps in a row had no finite gradient.
        Stopped: a stop signal came; the state is saved.
    """
    made_of = recipe(model, spec, optimizer_spec, objective, seed)
    target = states.abstract(made_of, mesh)
    checkpoints = Checkpoints(workdir / "checkpoints", spec.keep_checkpoints, say)
    fingerprints = {"data": prepared.fingerprint, "tokenizer": prepared.tokenizer.fingerprint}

    start = checkpoints.latest()
    if start is None:
        _require_room(workdir, target, spec.keep_checkpoints)
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

    rates = trained_by(spec, optimizer_spec)
    if optimizers.freezes(rates):
        sizes = [(path_name(path), x.size) for path, x in jax.tree_util.tree_leaves_with_path(target.params)]
        trained = sum(size for name, size in sizes if optimizers.factor_of(name, rates))
        say(f"trained are {trained:,} of {sum(size for _, size in sizes):,} parameters; the others are frozen")

    step_function = build_step(made_of, spec, optimizer_spec, objective, mesh)

    def make(step: int) -> dict:
        host = batch_at(prepared.train, seed, step, spec.batch_size, jax.process_index(), jax.process_count())
        return put_batch(mesh, host)

    log = MetricsLog(workdir, start)
    began = time.perf_counter()

    def seconds() -> float:
        return seconds_before + time.perf_counter() - began

    def save(step: int) -> None:
        checkpoints.save(step, states.saved(state), fingerprints=fingerprints, seconds=seconds(), tokens=tokens)

    bar = tqdm(total=spec.steps, initial=start, desc="training", unit="step", mininterval=0.5, dynamic_ncols=True)
    mark, marked_tokens = began, tokens
    pending: collections.deque[tuple[int, dict, dict]] = collections.deque()

    def account() -> dict[str, float]:
        """Takes the oldest pending step into the record: its tokens, and whether it was skipped."""
        nonlocal tokens
        done, batch, metrics = pending.popleft()
        metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
        tokens += round(metrics["tokens"])
        bar.update()
        if metrics["skipped"]:
            tqdm.write(f"step {done} is skipped: its loss or gradient is not finite")
        if metrics["skipped_in_a_row"] >= spec.max_skipped:
            where = _save_diagnostic(workdir, done, batch, metrics)
            checkpoints.wait()
            raise RunFailed(
                f"{spec.max_skipped} steps in a row had no finite gradient, the last is step {done}; its batch is in "
                f"{where}; lower optimizer.learning_rate, or look at the batch"
            )
        return metrics

    with stop_signal.deferred(), bar:
        for step, batch in zip(range(start, spec.steps), prefetch(make, range(start, spec.steps))):
            state, metrics = step_function(state, batch)
            done = step + 1
            pending.append((done, batch, metrics))
            last = done == spec.steps
            stopping = stop_signal.requested and not last
            validating = done % spec.validate_every == 0 and not last
            saving = done % spec.checkpoint_every == 0 or last or stopping
            logging = done % spec.log_every == 0 or validating or last
            # The device works on this step while the host looks at the one before; a step that is looked at in any
            # other way is waited for.
            while len(pending) > (0 if logging or saving else 1):
                recorded = account()
            if logging:
                now = time.perf_counter()
                rate, mark, marked_tokens = (tokens - marked_tokens) / (now - mark), now, tokens
                row = {"step": done, "tokens_per_second": rate}
                row |= {name: value for name, value in recorded.items() if name not in _COUNTS}
                if validating:
                    row |= {
                        f"validation.{name}": value for name, value in validate(made_of.model_params(state)).items()
                    }
                    mark = time.perf_counter()
                log.write(row)
                bar.set_postfix_str(f"loss {recorded['loss']:.3f}, {rate:,.0f} tokens/s")
            if saving:
                save(done)
            if stopping:
                checkpoints.wait()
                log.close()
                raise Stopped(f"saved step {done} of {spec.steps}; the same command goes on")
        checkpoints.wait()
        if stop_signal.requested:
            log.close()
            raise Stopped(f"saved the last step, {spec.steps}; the same command finishes the run")
    log.close()
    return Trained(state, made_of.model_params(state), seconds(), tokens)


_COUNTS = ("weight", "tokens", "skipped_in_a_row")  # of a step's metrics, what is no record


def check_batch(spec: TrainingSpec, mesh: jax.sharding.Mesh) -> None:
    """Raises InputError when the batch cannot be shared equally by micro-batches and devices."""
    shards = batch_shards(mesh)
    if spec.batch_size % (shards * spec.microbatches):
        raise InputError(
            f"training.batch_size={spec.batch_size} is not a multiple of the mesh's {shards} data shards times "
            f"training.microbatches={spec.microbatches}"
        )


def _save_diagnostic(workdir: pathlib.Path, step: int, batch: dict, metrics: dict) -> pathlib.Path:
    path = workdir / f"diagnostic-{step}.npz"
    np.savez(path, step=step, **{f"metrics.{k}": v for k, v in metrics.items()}, **jax.device_get(batch))
    return path


def _require_room(workdir: pathlib.Path, target: states.TrainState, keep: int) -> None:
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((target.params, target.opt_state, target.ema)))
    needed = size * (keep + 1)  # a new checkpoint stands before the oldest goes
    free = shutil.disk_usage(workdir).free
    if free < needed:
        raise InputError(
            f"{workdir} has {free / 1e6:,.0f} MB free, {keep + 1} checkpoints of this model take "
            f"{needed / 1e6:,.0f} MB: make room, or lower training.keep_checkpoints"
        )
