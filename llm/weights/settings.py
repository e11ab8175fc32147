"""Reading a config.json of others: every field by its type, and what has no place here refused by name."""

from collections.abc import Mapping
from typing import Any

from llm.errors import InputError

# Theirs -> ours. "gated-" is T5's way to say that the MLP is gated.
_ACTIVATIONS = {
    "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu", "silu": "silu",
    "swish": "silu", "relu2": "relu2",
}  # fmt: skip


class Settings:
    """The fields of a config.json; `kind` is the model_type, for messages."""

    def __init__(self, config: Mapping[str, Any], kind: str):
        self.config, self._kind = config, kind

    def _get(self, name: str, default: Any, wanted: type | tuple[type, ...], what: str) -> Any:
        value = self.config.get(name)
        if value is None:
            if default is None:
                raise InputError(f"config.json lacks {name}, which a {self._kind} has")
            return default
        if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
            raise InputError(f"config.json, {name}={value!r}: expected {what}")
        return value

    def count(self, name: str, default: int | None = None) -> int:
        """An integer that is not negative."""
        value = self._get(name, default, int, "an integer")
        if value < 0:
            raise InputError(f"config.json, {name}={value}: must not be negative")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A number."""
        return float(self._get(name, default, (int, float), "a number"))

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        return self._get(name, default, bool, "true or false")

    def activation(self, name: str, default: str) -> str:
        """Our name of an activation."""
        value = self._get(name, default, str, "the name of an activation")
        if value not in _ACTIVATIONS:
            raise InputError(f"config.json, {name}={value!r}: there are {', '.join(sorted(_ACTIVATIONS))}")
        return _ACTIVATIONS[value]

    @staticmethod
    def activation_name(ours: str, gated: bool) -> str:
        """Their name of an activation of ours."""
        name = next(theirs for theirs, mine in _ACTIVATIONS.items() if mine == ours)
        return f"gated-{name}" if gated else name

    def expect(self, **values: Any) -> None:
        """Refuses a config in which one of these has another value than the only one that has a place here."""
        for name, wanted in values.items():
            found = self.config.get(name, wanted)
            if found is not None and found != wanted:
                raise InputError(f"config.json, {name}={found!r}: only {wanted!r} has a place here")
