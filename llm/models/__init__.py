"""The model families: wiring and presets only, over the blocks of `llm.nn`.

Every family is one linen module that follows `Model`; `build(spec)` makes it.
"""

import dataclasses
from typing import NamedTuple

from llm.errors import InputError
from llm.models.contract import Model, Output
from llm.models.gpt import GPT, GPTSpec

ModelSpec = GPTSpec


class Family(NamedTuple):
    """A family's settings, its module, built as `module(spec)`, and the objectives (`llm.data`) that it learns."""

    spec: type
    module: type
    objectives: tuple[str, ...]


FAMILIES: dict[str, Family] = {"gpt": Family(GPTSpec, GPT, ("causal",))}


def build(spec: ModelSpec, tokenizer_vocab: int | None = None) -> Model:
    """The linen module of a spec; its vocabulary, where the spec does not say it, is the tokenizer's.

    Raises:
        InputError: the spec's vocabulary is smaller than the tokenizer's.
    """
    if tokenizer_vocab is not None:
        if spec.vocab_size is None:
            spec = dataclasses.replace(spec, vocab_size=tokenizer_vocab)
        elif spec.vocab_size < tokenizer_vocab:
            raise InputError(
                f"model.vocab_size={spec.vocab_size} is smaller than the tokenizer's {tokenizer_vocab}: ids would fall "
                "outside the table"
            )
    for family in FAMILIES.values():
        if type(spec) is family.spec:
            return family.module(spec)
    raise TypeError(f"no family has a spec of type {type(spec).__name__}")


__all__ = ["FAMILIES", "Family", "Model", "ModelSpec", "Output", "build"]
