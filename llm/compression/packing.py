"""A model's parameters with its matrices packed (`llm.nn.packed`), for fast reading where nothing is trained."""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from llm.models import Model
from llm.nn.embed import Embed
from llm.nn.packed import GROUP, pack
from llm.nn.projection import Projection


class Packing(NamedTuple):
    """Packed parameters, bytes before and after, and the names of matrices that keep their floats.

    Those have inputs that 32 does not divide.
    """

    params: Any
    before: int
    after: int
    kept: tuple[str, ...]


def pack_params(model: Model, params: Any, bits: int, native: bool = False) -> Packing:
    """Packs the kernels of projections and the tables of embeddings; `model.apply` takes them in place of the floats.

    Norms, biases and the matrices of experts and recurrent cells stay as they are.

    Args:
        model: one that writes.
        params: as trained, layers stacked.
        bits: 8 or 4.
        native: whether products are to be computed by `llm.nn.native`, which is loaded.
    """
    found, kept = _matrices(model, params), []

    def one(path, x):
        place = tuple(key.key for key in path)
        if place not in found:
            return x
        inputs, outputs = found[place]
        if inputs % GROUP:
            kept.append("/".join(place))
            return x
        values = np.asarray(x)
        if place[-1] == "table":  # an output a row already
            return pack(values, bits, native)
        # Leading axes are the layers'.
        flat = values.reshape(*_leading(values.shape, inputs * outputs), inputs, outputs)
        return pack(flat.swapaxes(-1, -2), bits, native)

    packed = jax.tree_util.tree_map_with_path(one, params)
    before, after = (sum(x.nbytes for x in jax.tree.leaves(tree)) for tree in (params, packed))
    return Packing(packed, before, after, tuple(kept))


def _matrices(model: Model, params: Any) -> dict[tuple[str, ...], tuple[int, int]]:
    """Inputs and outputs of the matrices that projections and embeddings multiply with, by place in the parameters."""
    found = {}

    def note(call, args, kwargs, context):
        module = context.module
        if isinstance(module, Projection):
            found[*module.path, "kernel"] = math.prod(module.inputs), math.prod(module.outputs)
        elif isinstance(module, Embed):
            found[*module.path, "table"] = module.width, module.entries
        return call(*args, **kwargs)

    names = ["tokens", *(["source_tokens"] if model.reads_source else [])]
    batch = {name: jax.ShapeDtypeStruct((1, 8), jnp.int32) for name in names}

    def everything(params, batch):
        return model.apply({"params": params}, model.apply({"params": params}, batch).hidden_BTD, method="unembed")

    with nn.intercept_methods(note):
        jax.eval_shape(everything, params, batch)
    return found


def _leading(shape: tuple[int, ...], size: int) -> tuple[int, ...]:
    """The axes before those whose product is `size`."""
    n = len(shape)
    while math.prod(shape[n:]) < size:
        n -= 1
    return shape[:n]
