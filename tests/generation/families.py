"""The families that write, as generation's tests run them: small specs of the conformance table."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from llm import models
from tests.conformance import families
from tests.quick import quick

# Windows and learned positions; rotary and grouped heads; a state; a source, absolute and relative.
NAMES = ("gpt3", "llama", "rnn lstm", "encdec post-norm", "t5 1.0")
V = families.V


@functools.cache
def model(name):
    """(model, parameters, its context)."""
    spec = families.ROWS[name].spec
    return models.build(spec), jax.tree.map(jnp.asarray, families.parameters(name)), min(spec.context or 24, 24)


def sources(name, count):
    """Unlike sources of as many rows, as an argument of `complete`."""
    rows = [families.SOURCE_BS[n % 2, : 3 + 2 * n].tolist() for n in range(count)]
    return {"sources": rows} if families.ROWS[name].reads_source else {}


@functools.cache
def logits(name):
    """f(tokens_BT, source keys) -> logits_BTV of whole rows, as float64."""
    built, params, _ = model(name)

    def run(params, batch):
        return built.apply({"params": params}, built.apply({"params": params}, batch).hidden_BTD, method="unembed")

    compiled = quick(run)
    return lambda batch: np.float64(compiled(params, batch))
