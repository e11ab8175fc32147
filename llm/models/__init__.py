"""The model families: wiring and presets only, over the blocks of `llm.nn`.

Every family is one linen module that follows `Model`; `build(spec)` makes it.
"""

import dataclasses
from typing import NamedTuple

from llm.errors import InputError
from llm.models.bert import Bert, BertSpec
from llm.models.classifier import ClassifierSpec
from llm.models.contract import Model, Output
from llm.models.encdec import EncDecSpec
from llm.models.encoder_decoder import EncoderDecoder
from llm.models.gpt import GPT, GPTSpec, unrolled
from llm.models.presets import PRESETS
from llm.models.rnn import RNN, RNNSpec
from llm.models.t5 import T5Spec

ModelSpec = RNNSpec | ClassifierSpec | EncDecSpec | BertSpec | GPTSpec | T5Spec


class Family(NamedTuple):
    """A family's settings, its module, built as `module(spec)`, and the objectives (`llm.data`) that it learns."""

    spec: type
    module: type
    objectives: tuple[str, ...]


FAMILIES: dict[str, Family] = {
    "rnn": Family(RNNSpec, RNN, ("causal", "classification")),
    "classifier": Family(ClassifierSpec, EncoderDecoder, ("classification",)),
    "encdec": Family(EncDecSpec, EncoderDecoder, ("seq2seq", "span_corruption", "continuation")),
    "bert": Family(BertSpec, Bert, ("masked", "classification", "span_qa", "contrastive")),
    "gpt": Family(GPTSpec, GPT, ("causal", "prefix", "chat", "preference")),
    "t5": Family(T5Spec, EncoderDecoder, ("span_corruption", "seq2seq", "continuation")),
}
# Objectives after which a model can be asked to write.
WRITING = ("causal", "prefix", "seq2seq", "span_corruption", "continuation", "chat", "preference")
# Objectives whose prompts are what a user says, by the tokenizer's chat template.
CHATTING = ("chat", "preference")


def check_objective(family: str, spec: ModelSpec, objective: str) -> None:
    """Raises InputError when a family, or a model of these settings, does not learn an objective."""
    objectives = FAMILIES[family].objectives
    if objective not in objectives:
        raise InputError(f"objective.kind={objective!r}: the {family} family learns {', '.join(objectives)}")
    if isinstance(spec, RNNSpec) and spec.bidirectional and objective != "classification":
        raise InputError(
            f"model.bidirectional=True: objective.kind={objective!r} predicts what the other direction has read; "
            "set it to False"
        )
    if isinstance(spec, RNNSpec) and spec.carry and objective != "causal":
        raise InputError(f"model.carry=True: rows of objective.kind={objective!r} do not go on; set it to False")


def width_share(spec: ModelSpec) -> float:
    """The width whose learning rate a model keeps over its own (`GPTSpec.width_base`); 1 where it has its own rate."""
    return spec.width_share if isinstance(spec, GPTSpec) else 1.0


def build(spec: ModelSpec, tokenizer_vocab: int | None = None, classes: int | None = None) -> Model:
    """The linen module of a spec; its vocabulary and its classes, where the spec does not say them, are the data's.

    Args:
        spec: a family's settings.
        tokenizer_vocab: entries of the tokenizer.
        classes: those that the data's labels name; None or 0 where there are none.

    Raises:
        InputError: the spec's vocabulary is smaller than the tokenizer's, or it has fewer classes than the data.
    """
    if tokenizer_vocab is not None:
        if spec.vocab_size is None:
            spec = dataclasses.replace(spec, vocab_size=tokenizer_vocab)
        elif spec.vocab_size < tokenizer_vocab:
            raise InputError(
                f"model.vocab_size={spec.vocab_size} is smaller than the tokenizer's {tokenizer_vocab}: ids would fall "
                "outside the table"
            )
    if classes and isinstance(spec, (RNNSpec, ClassifierSpec, BertSpec)):
        if spec.classes is None:
            spec = dataclasses.replace(spec, classes=classes)
        elif spec.classes < classes:
            raise InputError(
                f"model.classes={spec.classes}: the data's labels name {classes}; set it to that, or to None"
            )
    for family in FAMILIES.values():
        if type(spec) is family.spec:
            return family.module(spec)
    raise TypeError(f"no family has a spec of type {type(spec).__name__}")


__all__ = [
    "CHATTING",
    "FAMILIES",
    "PRESETS",
    "WRITING",
    "BertSpec",
    "ClassifierSpec",
    "EncDecSpec",
    "Family",
    "GPTSpec",
    "Model",
    "ModelSpec",
    "Output",
    "RNNSpec",
    "T5Spec",
    "build",
    "check_objective",
    "unrolled",
]
