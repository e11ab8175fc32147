"""A step that was not finite, computed again piece by piece, to name the first tensor of it that is not finite.

In the order of the computation: batch, parameters, moments; what every module gives, layer by layer; the loss; the
gradients; the update. Dropout is that of the step. The pieces are programs of their own, so that rounding may differ
from the train step's, and a number that overflows there by a hair may be finite here.
"""

import functools
import itertools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from llm import models
from llm.data import ObjectiveSpec
from llm.errors import RunFailed
from llm.training import diagnostics, loop
from llm.training import state as states
from llm.training.optimizer import clip_by_norm
from llm.training.roles import path_name
from llm.training.spec import OptimizerSpec, TrainingSpec
from llm.training.step import deal, put_batch


class Call(NamedTuple):
    """One call of a module.

    Attributes:
        name: its path, "stack/layers/mlp/up", and the method where it is not `__call__`.
        round: the how-manieth call of this place of the program, from 0: the layer in a loop over layers.
        bad, size: numbers it gave that are not finite, of how many.
        largest: the largest size among its finite inputs.
    """

    name: str
    round: int
    bad: int
    size: int
    largest: float


def replay(
    model: models.Model,
    spec: TrainingSpec,
    optimizer_spec: OptimizerSpec,
    objective: ObjectiveSpec,
    seed: int,
    mesh: jax.sharding.Mesh,
    workdir: pathlib.Path,
    step: int | None,
    say: Callable[[str], None] = print,
) -> None:
    """Says of a kept step (`llm.training.diagnostics`), the latest by default, where it begins not to be finite.

    Raises:
        InputError: no such step was kept.
        RunFailed: all of it is finite here.
    """
    made_of = loop.recipe(model, spec, optimizer_spec, objective, seed)
    saved = diagnostics.load(workdir, step, states.abstract(made_of, mesh), say)
    say(f"step {saved.step}: loss {saved.metrics['loss']}, norm of the gradient {saved.metrics['grad_norm']}")
    if saved.of == saved.step - 1:
        say("its batch, dropout and parameters are exactly that step's")
    else:
        say(f"its batch and dropout are that step's; the parameters are those after step {saved.of}, not its own")
    loss = loop.loss_of(made_of, spec, optimizer_spec, objective)
    found = first_bad(loss, made_of.optimizer, saved, spec.microbatches, optimizer_spec.clip_norm, mesh, say)
    if found is None:
        raise RunFailed(f"everything of step {saved.step} is finite here: it does not show with these parameters")
    say(f"first: {found}")


def first_bad(
    loss: Callable,
    optimizer: optax.GradientTransformation,
    saved: diagnostics.Saved,
    microbatches: int,
    clip_norm: float | None,
    mesh: jax.sharding.Mesh,
    say: Callable[[str], None],
) -> str | None:
    """The first tensor that is not finite, in words, or None; `say` is told of each piece up to it."""
    state = saved.state
    inputs = {"batch": saved.batch, "parameter": state.params, "moment": state.opt_state, "carried state": state.carry}
    worst = None
    for kind, tree in inputs.items():
        found = bad_leaves(kind, tree)
        say(f"{kind}: {'; '.join(found[:5]) or 'finite'}")
        worst = worst or (found[0] if found else None)

    batch = put_batch(mesh, saved.batch)
    dealt = deal(batch, microbatches)
    parts = [jax.tree.map(lambda x, i=i: x[i], dealt) for i in range(microbatches)]
    keys = [jax.random.fold_in(jax.random.fold_in(state.rng, saved.step - 1), i) for i in range(microbatches)]
    carried = () if state.carry is None else (state.carry,)
    look = looked_at(loss)
    calls: list[Call] = []
    for part, key in zip(parts, keys):
        sums, calls = look(state.params, part, key, *carried)
        call = next((one for one in calls if one.bad), None)
        if call is not None:
            found = f"what module {_where(call)} gives: {call.bad:,} of {call.size:,} numbers are not finite"
            say(f"{found}; the largest number that it was given is {call.largest:.3g}")
            return worst or found
        for name, (total, _) in sums.items():
            if not np.isfinite(total):
                return worst or f"{name}: the sum of the batch is {float(total)}, and all modules' outputs are finite"
    say("modules and losses: finite")
    if worst is not None:
        return worst  # a moment, or a parameter that nothing of this batch meets

    gradients, weight = _gradients(loss, state.params, parts, keys, carried)
    found = first_bad_gradient(gradients, calls)
    if found is not None:
        return found
    gradients = jax.tree.map(lambda g: g / jnp.maximum(weight, 1.0), gradients)
    norm = optax.tree.norm(gradients)
    say(f"gradient: finite, its norm is {float(norm):.6g}")
    if not jnp.isfinite(norm):
        largest = max(jax.tree_util.tree_leaves_with_path(gradients), key=lambda leaf: float(jnp.abs(leaf[1]).max()))
        return f"the norm of the gradient overflows float32; {path_name(largest[0])} has its largest number"
    updates, _ = optimizer.update(clip_by_norm(gradients, norm, clip_norm), state.opt_state, state.params)
    found = bad_leaves("update", updates)
    return found[0] if found else None


def bad_leaves(kind: str, tree: Any) -> list[str]:
    """The arrays of a tree that have numbers which are not finite, each in words, with the place of the first."""
    found = []
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            continue
        bad = np.argwhere(~np.isfinite(np.asarray(x, np.float32)))
        if len(bad):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            first = [int(i) for i in bad[0]]
            found.append(
                f"{kind} {name}: {len(bad):,} of {x.size:,} numbers are not finite, the first at {first}: "
                f"{float(x[tuple(first)])}"
            )
    return found


def first_bad_gradient(gradients: Any, calls: list[Call]) -> str | None:
    """The gradient that is not finite and comes first in the backward pass, in words: that of the last call of all.

    A parameter that several calls share, a tied table, has its gradient only when the first of them is passed.
    """
    first_call: dict[tuple[str, int], int] = {}
    for at, call in enumerate(calls):
        module = call.name.split(".")[0]
        first_call.setdefault((module, call.round if _in_layers(module) else 0), at)
    modules = {module for module, _ in first_call}
    found: list[tuple[int, str]] = []
    for path, x in jax.tree_util.tree_leaves_with_path(gradients):
        bad = ~np.isfinite(np.asarray(x, np.float32))
        if not bad.any():
            continue
        name = path_name(path)
        layers = np.flatnonzero(bad.reshape(len(x), -1).any(1)) if _in_layers(name) else [0]
        owner = max((one for one in modules if name.startswith(f"{one}/")), key=len, default="")
        where = f" in layer {layers[-1]}" if _in_layers(name) else ""
        found.append(
            (
                first_call.get((owner, int(layers[-1])), -1),
                f"gradient {name}{where}: {bad.sum():,} of {x.size:,} numbers are not finite",
            )
        )
    return max(found, default=(0, None))[1]


def looked_at(loss: Callable) -> Callable[..., tuple[dict, list[Call]]]:
    """A loss that looks at what every module gives, each layer by itself, on the devices of any mesh of one process.

    Args:
        loss: f(*arguments) -> sums by name, and with a carried state as its fourth argument (sums, state).

    Returns:
        f(*arguments) -> the sums, and all calls of modules in the order of the program.
    """
    calls: list[tuple[int, Call]] = []  # with the place of the call in the traced program
    places = itertools.count()

    def record(place: int, name: str, size: int, bad, largest) -> np.ndarray:
        turn = sum(other == place for other, _ in calls)
        calls.append((place, Call(name, turn, int(bad), size, float(largest))))
        return np.ones((), np.float32)

    def look(following, args, kwargs, context):
        result = following(*args, **kwargs)
        outputs = _floats(result)
        if context.method_name == "setup" or not outputs:
            return result
        method = "" if context.method_name == "__call__" else f".{context.method_name}"
        name = ("/".join(context.module.path) or type(context.module).__name__) + method
        bad = sum((~jnp.isfinite(x)).sum() for x in outputs)
        given = [jnp.where(jnp.isfinite(x), jnp.abs(x), 0).max(initial=0) for x in _floats((args, kwargs))]
        largest = functools.reduce(jnp.maximum, given, jnp.zeros(()))
        report = functools.partial(record, next(places), name, sum(x.size for x in outputs))
        # Ordered callbacks are of one device alone, and a layer is known by the order. The factor of 1 that comes back
        # makes what follows wait: a layer's reports are in before the next one's can be made. It is "pure" because
        # nothing else goes through a layer that is rematerialised; what nobody takes in is then not reported.
        one = jax.pure_callback(report, jax.ShapeDtypeStruct((), jnp.float32), bad, largest)
        return jax.tree.map(lambda x: x * one.astype(x.dtype) if _is_float(x) else x, result)

    program = jax.jit(lambda *arguments: loss(*arguments))  # of its own: no trace from before is taken for it

    def run(*arguments) -> tuple[dict, list[Call]]:
        calls.clear()
        with nn.intercept_methods(look):
            result: Any = jax.block_until_ready(program(*arguments))
        sums = jax.device_get(result[0] if len(arguments) == 4 else result)
        return sums, [call for _, call in sorted(calls, key=_order(calls))]

    return run


def _order(calls: list[tuple[int, Call]]) -> Callable:
    """When a call comes in the program: the places within one loop over layers take turns."""
    begins: dict[int, int] = {}
    loop_of = last = None
    for place, name in sorted({place: call.name for place, call in calls}.items()):
        layers = name.split("/layers", 1)[0] if _in_layers(name) else None
        begins[place] = begins[last] if last is not None and layers is not None and layers == loop_of else place
        loop_of, last = layers, place
    return lambda call: (begins[call[0]], call[1].round, call[0])


def _in_layers(name: str) -> bool:
    return "layers" in name.split("/")


def _floats(tree: Any) -> list[jax.Array]:
    return [x for x in jax.tree.leaves(tree) if _is_float(x)]


def _is_float(x: Any) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.inexact)


def _where(call: Call) -> str:
    return f"{call.name} in layer {call.round}" if _in_layers(call.name) else call.name


def _gradients(loss: Callable, params, parts: list[dict], keys: list, carried: tuple) -> tuple[Any, jax.Array]:
    """Of the sum of the losses of all parts; and the sum of their weights."""

    @jax.jit
    def gradient(params, part, key, *carried):
        def total(params):
            returned = loss(params, part, key, *carried)
            value, weight = (returned[0] if carried else returned)["loss"]
            return value, weight

        return jax.grad(total, has_aux=True)(params)

    found = [gradient(params, part, key, *carried) for part, key in zip(parts, keys)]
    return jax.tree.map(lambda *x: sum(x[1:], x[0]), *found)
