"""The model families: wiring and presets only, over the blocks of `llm.nn`.

Every family is one linen module that follows `Model`; `build(spec)` makes it.
"""

from typing import NamedTuple

from llm.models.contract import Model, Output
from llm.models.gpt import GPT, GPTSpec

ModelSpec = GPTSpec


class Family(NamedTuple):
    """A family's settings and its module, built as `module(spec)`."""

    spec: type
    module: type


FAMILIES: dict[str, Family] = {"gpt": Family(GPTSpec, GPT)}


def build(spec: ModelSpec) -> Model:
    """The linen module of a spec."""
    for family in FAMILIES.values():
        if type(spec) is family.spec:
            return family.module(spec)
    raise TypeError(f"no family has a spec of type {type(spec).__name__}")


__all__ = ["FAMILIES", "Family", "Model", "ModelSpec", "Output", "build"]
