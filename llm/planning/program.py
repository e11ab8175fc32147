"""The train step of an experiment compiled for a topology: the one that `llm.train` runs, on shapes alone."""

import contextlib
import math
import re
import time
from typing import NamedTuple

import jax

from llm import models, sharding
from llm.attention.target import compiling_for
from llm.config import Experiment
from llm.errors import InputError, RunFailed
from llm.models import flops
from llm.planning.batch import abstract_batch, tokens_of
from llm.planning.hlo import Instruction, Module, parse
from llm.planning.topology import Topology
from llm.training import state
from llm.training.loop import build_step, check_batch, recipe


class Kernel(NamedTuple):
    """What "auto" must have found on a platform: our kernel, and what tells its calls by, "name op_name"."""

    name: str
    target: str
    forward: str
    backward: str


KERNELS = {
    "tpu": Kernel("mosaic_tpu", "tpu_custom_call", r"attention_forward", r"attention_backward"),
    # Its calls have no names, but the place in the model, and whether that is the backward pass.
    "cuda": Kernel(
        "mosaic_gpu",
        "mosaic_gpu",
        r"\S+ (?!.*transpose\().*attention\._attend",
        r"\S+ .*transpose\(.*attention\._attend",
    ),
}


class DoesNotFit(RunFailed):
    """The compiler refused a program because it needs more memory than a device has."""


class Memory(NamedTuple):
    """Bytes of one device: what the program is given, gives back, of that in place, works in, and is itself.

    `compiler_peak` is what the compiler says of the most at one time, where it does: less than `peak` where arguments
    and temporaries share room.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    compiler_peak: int | None

    @property
    def peak(self) -> int:
        """All at once: the state and the batch, what is computed between, and results that are not in place."""
        return self.arguments + self.temporaries + self.outputs - self.aliased


class Program(NamedTuple):
    """A compiled train step.

    Attributes:
        topology: the devices.
        mesh: sizes of the mesh axes by name.
        parameters: numbers trained.
        state: bytes of a device that parameters and optimizer take.
        tokens: read by one step.
        flops: of one step, three times the model's forward pass (the backward pass counts as two).
        executed: floating-point operations with what rematerialisation repeats.
        counted: those that the compiler counts on one device, loops once; None where it does not.
        memory: of one device.
        module: the compiled text.
        attention: which attention is in it, in words.
        seconds: that tracing, lowering and compiling took.
    """

    topology: Topology
    mesh: dict[str, int]
    parameters: int
    state: float
    tokens: int
    flops: float
    executed: float
    counted: float | None
    memory: Memory
    module: Module
    attention: str
    seconds: float


class Abstract(NamedTuple):
    """A train step before it is compiled: its mesh, its recipe, and the shapes of its state and batch."""

    mesh: jax.sharding.Mesh
    made_of: state.Recipe
    state: state.TrainState
    batch: dict[str, jax.ShapeDtypeStruct]


def abstract(experiment: Experiment, topology: Topology) -> Abstract:
    """The shapes of a run's train step.

    Raises:
        InputError: a mesh, batch or model that do not fit each other, or a size that only data could tell.
    """
    mesh = sharding.make_mesh(experiment.mesh, topology.devices)
    check_batch(experiment.training, mesh)
    sharding.check_length(experiment.data.row_length, mesh)
    model = models.build(experiment.model, experiment.tokenizer.entries)
    if experiment.objective.kind == "classification" and getattr(model.spec, "classes", None) is None:
        raise InputError("model.classes=None: without data nobody knows; say --config.model.classes=2")
    made_of = recipe(model, experiment.training, experiment.optimizer, experiment.objective, experiment.seed)
    state.check_mesh(made_of, mesh)
    return Abstract(
        mesh, made_of, state.abstract(made_of, mesh), abstract_batch(experiment, model.spec.vocab_size, mesh)
    )


def compile_program(experiment: Experiment, topology: Topology) -> Program:
    """Compiles the train step of an experiment for a topology.

    Raises:
        InputError: as `abstract`.
        DoesNotFit: it needs more memory than a device has.
        RunFailed: our attention kernel should be in the program, and is not.
    """
    began = time.perf_counter()
    given = abstract(experiment, topology)
    target = contextlib.nullcontext() if topology.target is None else compiling_for(**topology.target)
    step = build_step(given.made_of, experiment.training, experiment.optimizer, experiment.objective, given.mesh)
    with jax.set_mesh(given.mesh), target:
        lowered = step.trace(given.state, given.batch).lower(lowering_platforms=(topology.platform,))
        try:
            compiled = lowered.compile(topology.options)
        except jax.errors.JaxRuntimeError as error:
            raise _too_large(error, topology) from None
    module, stats, costs = parse(compiled.as_text()), compiled.memory_analysis(), compiled.cost_analysis()
    tokens = tokens_of(given.batch)
    model, params, length = given.made_of.model, given.state.params, experiment.data.row_length
    forward = model.flops_per_token(params, length) * tokens
    return Program(
        topology=topology,
        mesh=dict(given.mesh.shape),
        parameters=state.count_parameters(given.state.params),
        state=held((given.state.params, given.state.opt_state)),
        tokens=tokens,
        flops=3 * forward,
        executed=3 * forward + flops.repeated(model, params, length) * tokens,
        counted=None if costs is None else costs.get("flops"),
        memory=Memory(
            stats.argument_size_in_bytes,
            stats.output_size_in_bytes,
            stats.alias_size_in_bytes,
            stats.temp_size_in_bytes,
            stats.generated_code_size_in_bytes,
            stats.peak_memory_in_bytes if topology.platform == "tpu" else None,  # elsewhere it leaves temporaries out
        ),
        module=module,
        attention=_attention(experiment, topology, module),
        seconds=time.perf_counter() - began,
    )


def held(tree) -> float:
    """Bytes that one device holds of arrays that are placed on a mesh."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _too_large(error: RuntimeError, topology: Topology) -> Exception:
    """What the compiler says of memory in one line; any other complaint as it is."""
    if "RESOURCE_EXHAUSTED" not in str(error):
        return error
    says = str(error).splitlines()[0].removeprefix("RESOURCE_EXHAUSTED: ")
    return DoesNotFit(
        f"it does not fit on {topology.name}: {says} More devices, another mesh (--suggest), model.remat=all, "
        "training.microbatches and training.loss_chunk need less"
    )


def _attention(experiment: Experiment, topology: Topology, module: Module) -> str:
    """Which attention the program has.

    Raises:
        RunFailed: our kernel should be in it, and is not.
    """
    asked = getattr(experiment.model, "attention", None)
    if asked is None:
        return "none in this family"
    kernel = KERNELS.get(topology.platform)
    if asked != "auto" and (kernel is None or asked != kernel.name):
        return f"{asked}, as model.attention says"
    if kernel is None:
        return "blockwise, in XLA; our kernels are for TPUs and GPUs"
    calls = [
        f"{x.name} {_op_name(x)}"
        for computation, instructions in module.computations.items()
        for x in instructions.values()
        if module.times[computation] and f'custom_call_target="{kernel.target}' in x.attributes
    ]
    forward, backward = (
        sum(re.match(p, call) is not None for call in calls) for p in (kernel.forward, kernel.backward)
    )
    if not (forward and backward):
        raise RunFailed(
            f"our attention kernel {kernel.name} is not in the program for {topology.name}: of its kind of calls there "
            f"are {', '.join(calls) or 'none'}; look at model.dtype and the logged choice of attention"
        )
    return f"our kernel {kernel.name} is in the program: {forward} calls forward, {backward} backward"


def _op_name(x: Instruction) -> str:
    found = re.search(r'op_name="([^"]*)"', x.attributes)
    return found[1] if found else ""
