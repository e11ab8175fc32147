"""What a mesh would need and take, without compiling: what `suggest` ranks by."""

import dataclasses
import math
from collections.abc import Iterator
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from llm import models
from llm.config import Experiment
from llm.devices import Device
from llm.models import flops
from llm.planning.batch import made_up_row, tokens_of
from llm.planning.collectives import Collective
from llm.planning.roofline import bandwidth
from llm.sharding import AXES, MeshSpec, partition_spec
from llm.training import state
from llm.training.loop import recipe

SPLIT = ("data", "fsdp", "tensor", "context")  # the axes that are tried; any other stays as the config says


class Estimate(NamedTuple):
    """One mesh.

    Attributes:
        mesh: its settings.
        known: bytes of a device that parameters, optimizer and gradients take.
        activations: bytes that activations take, by a formula which one compiled program has to scale.
        arithmetic, network: seconds of a step, the network's along the axis that takes longest.
        sent: seconds of the network along all axes.
        model: seconds of the model's own operations.
    """

    mesh: MeshSpec
    known: float
    activations: float
    arithmetic: float
    network: float
    sent: float
    model: float

    @property
    def seconds(self) -> float:
        """Of a step, at best."""
        return max(self.arithmetic, self.network)


class _Size(NamedTuple):
    """What a step is made of, whatever the mesh."""

    parameters: int
    tokens: int
    forward: float
    repeated: float
    layers: int
    width: int
    ff_width: int
    item: int
    remat: str


def estimates(experiment: Experiment, devices: int, device: Device) -> list[Estimate]:
    """One of every mesh of so many devices that divides rows, length and parameters.

    Raises:
        InputError: a size that only data could tell.
    """
    spec = experiment.model
    model = models.build(spec, experiment.tokenizer.entries)
    boxed = recipe(model, experiment.training, experiment.optimizer, experiment.objective, experiment.seed).boxed()
    row = made_up_row(experiment, model.spec.vocab_size)
    tokens = experiment.training.batch_size * tokens_of(row)
    params, length = nn.unbox(boxed.params), experiment.data.row_length
    decoder = getattr(spec, "decoder_layers", 0)
    size = _Size(
        parameters=state.count_parameters(boxed.params),
        tokens=tokens,
        forward=tokens * model.flops_per_token(params, length),
        repeated=tokens * flops.repeated(model, params, length),
        layers=spec.layers + (spec.layers if decoder is None else decoder),
        width=spec.width,
        ff_width=getattr(spec, "ff_width", None) or 4 * spec.width,
        item=jnp.dtype(spec.dtype).itemsize,
        remat=spec.remat,
    )
    found = []
    for mesh in _meshes(experiment, devices):
        sizes: dict[str, int] = dict(zip(AXES, mesh.shape(devices)))
        trained, kept = _held(boxed.params, sizes), _held(boxed.opt_state, sizes)
        if trained is not None and kept is not None:
            found.append(_estimate(size, mesh, sizes, 2 * trained + kept, experiment.training.microbatches, device))
    return found


def _meshes(experiment: Experiment, devices: int) -> Iterator[MeshSpec]:
    rows = experiment.training.batch_size // experiment.training.microbatches // max(1, experiment.mesh.expert)
    free = devices // math.prod(getattr(experiment.mesh, axis) for axis in AXES if axis not in SPLIT)
    for tensor in _divisors(free):
        # A ring of n devices deals out 2 n stripes of a row.
        for context in _divisors(math.gcd(free // tensor, experiment.data.row_length // 2)):
            for fsdp in _divisors(free // tensor // context):
                data = free // tensor // context // fsdp
                if rows % (data * fsdp) == 0:
                    yield dataclasses.replace(experiment.mesh, data=data, fsdp=fsdp, tensor=tensor, context=context)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _is_box(x) -> bool:
    return isinstance(x, nn.LogicallyPartitioned)


def _held(tree, sizes: dict[str, int]) -> float | None:
    """Bytes that a device holds of boxed arrays; None where an axis cannot be split into equal parts."""
    total = 0.0
    for box in jax.tree.leaves(tree, is_leaf=_is_box):
        if not _is_box(box):
            continue
        parts = 1
        for length, axes in zip(box.value.shape, partition_spec(box.names)):
            along = math.prod(sizes[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ()))
            if length % along:
                return None
            parts *= along
        total += box.value.size * box.value.dtype.itemsize / parts
    return total


def _estimate(
    s: _Size, mesh: MeshSpec, sizes: dict[str, int], known: float, microbatches: int, device: Device
) -> Estimate:
    """By the shapes of a Transformer: what a layer keeps, gathers and reduces."""
    devices, tensor = math.prod(sizes.values()), sizes["tensor"]
    held = s.tokens / (devices / tensor)  # tokens of a device in a step: every other axis splits them
    # Of a layer: its norms and residuals, whole along "tensor", and what its products read, split.
    inside = 4 * s.width + (4 * s.width + 3 * s.ff_width) / tensor
    products = 3 * s.width + (3 * s.width + 2 * s.ff_width) / tensor  # the results, and what goes into the layer
    a_layer = {"": inside, "all": s.width}.get(s.remat, products)
    kept = s.layers * a_layer + inside
    weights = s.parameters * s.item / tensor
    # How often a step passes over the weights, and over keys and values: attention is repeated by every policy.
    passes, attending = 3 if s.remat == "all" else 2, 3 if s.remat else 2
    operands = {
        # Weights are gathered in every pass over a layer; their gradients are scattered once.
        "fsdp": [
            ("all-gather", passes * microbatches * weights / sizes["fsdp"]),
            ("reduce-scatter", weights * microbatches),
        ],
        "data": [("all-reduce", weights / sizes["fsdp"])],
        # The two parts of a layer, forward and backward; of a repeated forward pass the last sum is not needed.
        "tensor": [("all-reduce", (5 if s.remat == "all" else 4) * s.layers * held * s.width * s.item)],
        # Keys and values.
        "context": [("all-gather", attending * s.layers * held * 2 * s.width * s.item / tensor)],
    }
    places = np.arange(devices).reshape(tuple(sizes.values()))

    def seconds(axis: str) -> float:
        group = np.moveaxis(places, list(sizes).index(axis), -1).reshape(-1, sizes[axis])[0].tolist()
        sends = [Collective(kind, (axis,), tuple(group), 1, operand) for kind, operand in operands[axis]]
        return sum(one.sent / bandwidth(one, device) for one in sends)

    network = [seconds(axis) for axis in SPLIT]
    peak = devices * device.flops
    return Estimate(
        mesh,
        known=known,
        activations=held / microbatches * kept * s.item,
        arithmetic=(3 * s.forward + s.repeated) / peak,
        network=max(network),
        sent=sum(network),
        model=3 * s.forward / peak,
    )
