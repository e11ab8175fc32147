"""The train step: one pure function from (state, batch) to (state, metrics)."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from llm.sharding import partition_spec
from llm.training.losses import Sums
from llm.training.optimizer import clip_by_norm
from llm.training.roles import norms_by_role
from llm.training.state import TrainState

STOP = "stop"  # of a batch of several hosts: above 0 in the rows of one that has been asked to stop


def train_step(
    state: TrainState,
    batch: dict,
    *,
    loss: Callable[..., Sums],
    optimizer: optax.GradientTransformation,
    schedule: Callable,
    clip_norm: float | None,
    microbatches: int = 1,
    ema_decay: float | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update.

    The gradient is that of the whole batch's loss sum divided once by its whole weight, however many micro-batches it
    is computed in. A step whose loss or gradient is not finite changes nothing but the counters of the state.

    Args:
        loss: f(params, batch, dropout_key) -> {name: (sum, weight)}, as in `llm.training.losses`; where the state has
            a carry, f(params, batch, dropout_key, carry) -> (sums, the next carry).
        schedule: the optimizer's learning rate by update, for the record.
        clip_norm: largest global norm of the gradient.
        batch: as in `llm.data.objectives`; of several hosts also STOP, (B,) float32.
        ema_decay: of the state's moving average, where it has one; at update n it is (1 + n) / (10 + n) while that is
            less, so that the average soon forgets where the run began.

    Returns:
        The new state and float32 scalars: the means of all losses, grad_norm (before clipping), learning_rate (the
        one used), weight (of the loss), tokens (read: those that are not padding, sources included), skipped (1 if
        this step was), skipped_in_a_row; and of each role's parameters grad_norm/<role> (before clipping) and
        update_norm/<role> (of what was added to them, 0 where the step was skipped); and of several hosts STOP.
    """
    dropout_key = jax.random.fold_in(state.rng, state.step)

    carry = state.carry

    def sums_of(params, batch, key):
        returned: Any = loss(params, batch, key) if carry is None else loss(params, batch, key, carry)
        sums, after = (returned, None) if carry is None else returned
        return sums["loss"][0], (sums, after)

    def part(index, part_batch):
        key = jax.random.fold_in(dropout_key, index)
        (_, (sums, after)), gradients = jax.value_and_grad(sums_of, has_aux=True)(state.params, part_batch, key)
        return (gradients, sums), after

    if microbatches == 1:
        (gradients, sums), carry = part(0, batch)
    elif carry is not None:
        raise ValueError("a carried state belongs to the rows of the whole batch: no micro-batches")
    else:
        dealt = deal(batch, microbatches)

        def accumulate(total, indexed):
            return jax.tree.map(jnp.add, total, part(*indexed)[0]), None

        first, _ = part(0, jax.tree.map(lambda x: x[0], dealt))
        rest = jnp.arange(1, microbatches), jax.tree.map(lambda x: x[1:], dealt)
        (gradients, sums), _ = jax.lax.scan(accumulate, first, rest)

    weight = sums["loss"][1]
    gradients = jax.tree.map(lambda g: g / jnp.maximum(weight, 1.0), gradients)
    norm = optax.tree.norm(gradients)
    finite = jnp.isfinite(norm) & jnp.isfinite(sums["loss"][0])
    updates, opt_state = optimizer.update(clip_by_norm(gradients, norm, clip_norm), state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)

    ema = state.ema
    if ema_decay is not None:
        made = (state.step - state.skipped).astype(jnp.float32)
        new = 1 - jnp.minimum(ema_decay, (1 + made) / (10 + made))
        ema = jax.tree.map(lambda old, p: old + new * (p - old), ema, params)

    def keep(new, old):
        return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

    skipped = jnp.where(finite, 0, 1)
    in_a_row = (state.skipped_in_a_row + 1) * skipped
    metrics = {name: total / jnp.maximum(w, 1.0) for name, (total, w) in sums.items()}
    metrics |= {f"grad_norm/{name}": value for name, value in norms_by_role(gradients).items()}
    metrics |= {f"update_norm/{name}": jnp.where(finite, value, 0.0) for name, value in norms_by_role(updates).items()}
    metrics |= {
        "grad_norm": norm,
        "learning_rate": schedule(state.step - state.skipped),
        "weight": weight,
        # In float32 it is sent in one message with the other sums. By itself it waits for nothing, and on a CPU split
        # into devices a sum that may run beside others can keep the threads that these need.
        "tokens": sum(
            (batch[key] != 0).sum(dtype=jnp.float32) for key in ("segments", "source_segments") if key in batch
        ),
        "skipped": skipped,
        "skipped_in_a_row": in_a_row,
    }
    if STOP in batch:
        metrics[STOP] = batch[STOP].sum()
    new_state = dataclasses.replace(
        state,
        step=state.step + 1,
        skipped=state.skipped + skipped,
        skipped_in_a_row=in_a_row,
        params=keep(params, state.params),
        opt_state=keep(opt_state, state.opt_state),
        carry=keep(carry, state.carry),
        ema=keep(ema, state.ema),
    )
    return new_state, metrics


def deal(batch: dict, microbatches: int) -> dict:
    """A batch of B rows as its micro-batches: every array of shape (B, ...) to (microbatches, B // microbatches, ...).

    Rows are dealt out in turn, so that each micro-batch lies on all devices like the batch does.
    """
    return jax.tree.map(lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1), batch)


def compile_train_step(mesh: jax.sharding.Mesh, places: TrainState, **settings) -> Callable:
    """`train_step` jitted over the mesh, the state donated; `settings` are its keyword arguments.

    `places` is the state's sharding (`state_shardings`); batches are split over the data axes.
    """
    batch_place = NamedSharding(mesh, partition_spec(("batch",)))

    def step(state, batch):
        return train_step(state, batch, **settings)

    return jax.jit(step, in_shardings=(places, batch_place), out_shardings=(places, None), donate_argnums=0)


def put_batch(mesh: jax.sharding.Mesh, batch: dict, size: int | None = None) -> dict:
    """A host batch as global arrays on the mesh.

    Args:
        batch: all its rows, or this process's (`llm.sharding.hosts.rows_here`).
        size: rows of all processes, where these are only this one's.
    """
    place = NamedSharding(mesh, partition_spec(("batch",)))

    def put(x):
        return jax.make_array_from_process_local_data(place, x, (len(x) if size is None else size, *x.shape[1:]))

    return {key: put(value) for key, value in batch.items()}
