"""Refusals that the families' settings share; every message names the field and its value."""

from typing import Any

from llm.attention import IMPLEMENTATIONS
from llm.errors import InputError
from llm.nn.mlp import ACTIVATIONS
from llm.nn.remat import NAMES

CHOICES = {
    "activation": tuple(ACTIVATIONS),
    "attention": ("auto", *IMPLEMENTATIONS),
    "dtype": ("float32", "bfloat16"),
    "norm": ("rms", "layer"),
    "remat": NAMES,
}


def at_least_one(spec: Any, *names: str) -> None:
    """Fields that are counts; None stands for what comes from elsewhere."""
    for name in names:
        value = getattr(spec, name)
        if value is not None and value < 1:
            raise InputError(f"model.{name}={value}: must be at least 1")


def among(spec: Any, **choices: tuple[str, ...]) -> None:
    """Fields that name one of a few things: those given, and those of CHOICES that the spec has."""
    for name, allowed in (CHOICES | choices).items():
        if name in choices or hasattr(spec, name):
            value = getattr(spec, name)
            if value not in allowed:
                raise InputError(f"model.{name}={value!r}: there are {', '.join(x or repr(x) for x in allowed)}")


def rates(spec: Any, *names: str) -> None:
    """Fields that are dropout rates."""
    for name in names:
        value = getattr(spec, name)
        if not 0 <= value < 1:
            raise InputError(f"model.{name}={value}: must be at least 0 and below 1")


def divides(spec: Any, small: str, large: str, hint: str = "") -> None:
    """`small` divides `large`."""
    if getattr(spec, large) % getattr(spec, small):
        raise InputError(
            f"model.{small}={getattr(spec, small)} does not divide model.{large}={getattr(spec, large)}{hint}"
        )


def buckets(spec: Any) -> None:
    """`buckets` and `max_distance` of a relative bias (`llm.attention.bias.relative_position_bucket`)."""
    if spec.buckets % 2 or spec.buckets < 4:
        raise InputError(f"model.buckets={spec.buckets}: an even number, at least 4")
    if spec.max_distance <= spec.buckets // 2:
        raise InputError(f"model.max_distance={spec.max_distance}: must be above half of model.buckets={spec.buckets}")


def bag(spec: Any) -> None:
    """`bag` and `bag_pairs` of a classification head (`llm.nn.pool.BagOfWords`)."""
    if spec.bag < 0 or spec.bag_pairs < 0 or (spec.bag_pairs and not spec.bag):
        raise InputError(
            f"model.bag={spec.bag}, model.bag_pairs={spec.bag_pairs}: not negative, and pairs need a bag above 0"
        )
