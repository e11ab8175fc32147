"""What is swept: named settings of an experiment's fields, or ranges to search."""

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from llm.errors import InputError

# A name is the folder of a run, and stands in commands.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.=,+-]*")


@dataclasses.dataclass(frozen=True)
class Setting:
    """A run of a sweep: a name, that of its folder, and the fields that it sets, "optimizer.learning_rate"."""

    name: str
    fields: dict[str, Any]

    def flags(self) -> list[str]:
        """The fields as flags of llm.train.

        Raises:
            InputError: a value has no text that a command line takes.
        """
        return [f"--config.{path}={_text(path, value)}" for path, value in self.fields.items()]


@dataclasses.dataclass(frozen=True)
class Range:
    """Values of a field to search, from `low` to `high` with both ends; integers where both are.

    Attributes:
        low, high: the ends.
        log: searched by its logarithm, as rates are.
    """

    low: float
    high: float
    log: bool = False


def grid(fields: Mapping[str, Sequence[Any]]) -> list[Setting]:
    """A setting for every product of the fields' values; {"model.width": (32, 64)} has "width=32" and "width=64".

    Fields with one value are set and not named, unless every field has one.
    """
    named = [path for path, values in fields.items() if len(values) > 1] or list(fields)
    settings = []
    for values in itertools.product(*fields.values()):
        chosen = dict(zip(fields, values, strict=True))
        name = ",".join(f"{path.rpartition('.')[2]}={_short(chosen[path])}" for path in named)
        settings.append(Setting(name, chosen))
    return settings


def check_names(settings: Sequence[Setting]) -> None:
    """Raises InputError when a name is taken twice, or cannot be a folder's."""
    for i, setting in enumerate(settings):
        if not _NAME.fullmatch(setting.name):
            raise InputError(
                f"sweep(): the name {setting.name!r} cannot be a folder's; use letters, digits and _.=,+- after a "
                "first letter or digit"
            )
        if setting.name in {other.name for other in settings[:i]}:
            raise InputError(f"sweep(): two settings have the name {setting.name!r}; give each a name of its own")


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (tuple, list)):
        return "+".join(map(_short, value))
    return re.sub(r"[^A-Za-z0-9_.+-]", "-", str(value))


def _text(path: str, value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return repr(tuple(value))
    if isinstance(value, (bool, int, float, str)) or value is None:
        return str(value)
    raise InputError(f"sweep(): {path}={value!r}: a {type(value).__name__} cannot be given to llm.train; use text")
