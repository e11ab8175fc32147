"""Experiment configs: a ConfigDict to write and override, a tree of frozen typed specs to run.

An experiment is a Python file with `get_config(variant)`. It starts from `default_config(family)`, which holds every
field of every room's spec at its default, and changes what it wants:

    def get_config(variant: str = "") -> Config:
        config = default_config("gpt")
        config.model.width = 256
        return with_variant(config, variant, smoke={"training.steps": 20})

The ConfigDict is locked: a misspelt field is an error that names the nearest one. `resolve` turns it into an
`Experiment`, and only specs travel further.
"""

import ast
import dataclasses
import difflib
import importlib.util
import inspect
import json
import math
import pathlib
import sys
import traceback
import types
import typing

from ml_collections import ConfigDict, config_dict

from llm import models
from llm.data.spec import CleanSpec, DataSpec, DedupSpec, ObjectiveSpec
from llm.data.work import Preparation
from llm.errors import InputError
from llm.evaluation.spec import EvaluationSpec
from llm.generation.spec import GenerationSpec
from llm.sharding.spec import MeshSpec
from llm.tokenization.spec import TokenizerSpec
from llm.training.optimizer import CARRIED, schedule
from llm.training.spec import OptimizerSpec, TrainingSpec

# An ml_collections ConfigDict: no type checker can know its nested fields.
Config = typing.Any

# A config of this family has no model: llm.prepare runs it.
CORPUS = "corpus"
CORPUS_ROOMS = {
    "data": DataSpec,
    "clean": CleanSpec,
    "dedup": DedupSpec,
    "tokenizer": TokenizerSpec,
    "objective": ObjectiveSpec,
}
ROOMS = {
    **CORPUS_ROOMS,
    "optimizer": OptimizerSpec,
    "training": TrainingSpec,
    "evaluation": EvaluationSpec,
    "generation": GenerationSpec,
    "mesh": MeshSpec,
}


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything one run is made of. `family` names the model family, whose spec `model` is."""

    family: str
    seed: int
    model: models.ModelSpec
    data: DataSpec
    clean: CleanSpec
    dedup: DedupSpec
    tokenizer: TokenizerSpec
    objective: ObjectiveSpec
    optimizer: OptimizerSpec
    training: TrainingSpec
    evaluation: EvaluationSpec
    generation: GenerationSpec
    mesh: MeshSpec

    def __post_init__(self):
        context = self.model.context
        bag = isinstance(self.model, models.BertSpec) and self.model.bag and self.objective.kind == "classification"
        if context is not None and self.data.row_length > context and not bag:
            raise InputError(f"data.row_length={self.data.row_length} is longer than model.context={context}")
        if not 0 <= self.seed < 2**32:  # JAX's keys take 32 bits
            raise InputError(f"seed={self.seed}: must lie in 0..2^32-1")
        models.check_objective(self.family, self.model, self.objective.kind)
        self._check_parts()
        schedule(self.optimizer, self.training.steps)  # refuses a warm-up that does not end

    def _check_parts(self) -> None:
        """Refuses rooms that do not fit each other."""
        kind, whole_batch = self.objective.kind, self.training.microbatches == 1
        carries = isinstance(self.model, models.RNNSpec) and self.model.carry
        if carries and not self.objective.stream:
            raise InputError("model.carry=True: a state goes on where the text does; set objective.stream=True")
        if carries and not whole_batch:
            raise InputError(
                f"training.microbatches={self.training.microbatches}: model.carry=True has one batch; set 1"
            )
        if kind == "contrastive" and not whole_batch:
            raise InputError(
                f"training.microbatches={self.training.microbatches}: objective.kind='contrastive' compares all rows "
                "of a batch; set 1"
            )
        if kind == "preference" and not self.training.start_from:
            raise InputError(
                "objective.kind='preference' compares with the run that it starts from: name it in training.start_from"
            )
        if kind == "preference" and self.training.label_smoothing >= 0.5:
            raise InputError(
                f"training.label_smoothing={self.training.label_smoothing}: of objective.kind='preference' it must lie "
                "below 0.5, where no answer is preferred"
            )
        if kind in ("contrastive", "span_qa") and self.training.label_smoothing:
            raise InputError(
                f"training.label_smoothing={self.training.label_smoothing}: objective.kind={kind!r} smooths nothing; "
                "set 0"
            )
        if kind == "contrastive" and self.training.z_loss:
            raise InputError(
                f"training.z_loss={self.training.z_loss}: objective.kind='contrastive' compares cosines, which cannot "
                "drift; set 0"
            )
        if self.generation.prompts and kind not in models.WRITING:
            raise InputError(f"generation.prompts: a model of objective.kind={kind!r} writes nothing; give none")
        if isinstance(self.model, models.BertSpec) and self.model.types < len(self.data.fields):
            raise InputError(
                f"model.types={self.model.types}: data.fields={self.data.fields} needs {len(self.data.fields)}"
            )

        if getattr(self.model, "width_base", None) is not None and self.optimizer.name not in CARRIED:
            raise InputError(
                f"optimizer.name={self.optimizer.name!r}: model.width_base carries {' and '.join(CARRIED)} alone"
            )

    @property
    def preparation(self) -> Preparation:
        """What its data is prepared by."""
        return Preparation(**{name: getattr(self, name) for name in CORPUS_ROOMS})


# --- writing a config -------------------------------------------------------------------------------------------------


def default_config(family: str, preset: str = "") -> Config:
    """The config of a family with every field at its default, locked; "corpus" has the rooms of data alone.

    Args:
        family: a key of `llm.models.FAMILIES`, or "corpus".
        preset: a published size, a key of `llm.models.PRESETS[family]`, for the model's fields; "" has defaults.

    Raises:
        InputError: there is no such family or preset; the message lists those that exist, the nearest first.
    """
    rooms = _rooms(family)
    sizes = models.PRESETS.get(family, {})
    if preset and preset not in sizes:
        raise InputError(f"unknown preset {preset!r} of {family}; there are {_choices(preset, sizes)}")
    config = ConfigDict({"family": family} | ({} if family == CORPUS else {"seed": 0}))
    for room, spec in rooms.items():
        section = config[room] = ConfigDict()
        values = sizes[preset] if preset and room == "model" else spec()
        for name, kind in _fields(spec).items():
            default = getattr(values, name)
            # ml_collections takes the type of a field from its value; None needs a placeholder to have one.
            section[name] = config_dict.placeholder(_inner(kind)) if default is None else default
    return config.lock()


def with_variant(config: Config, variant: str, **variants: dict[str, typing.Any]) -> Config:
    """Applies the fields of one variant, `{"training.steps": 20}`, to a config; "" changes nothing.

    Raises:
        InputError: there is no such variant; the message lists those that exist.
    """
    if variant:
        if variant not in variants:
            raise InputError(f"unknown variant {variant!r}; there are {_choices(variant, variants)}")
        for path, value in variants[variant].items():
            _set(config, path, value)
    return config


def load(location: str) -> Config:
    """The config of `experiments/name.py` or `experiments/name.py:variant`, or that of a run, `runs/x/config.json`.

    Raises:
        InputError: no such file, no `get_config` in it, an exception inside it, an unknown variant.
    """
    name, _, variant = location.partition(":")
    path = pathlib.Path(name)
    try:
        found = path.is_file()
    except OSError as error:
        raise InputError(f"--config={location}: {error.strerror}") from None
    if not found:
        raise InputError(f"--config={location}: there is no file {name}")
    if path.suffix == ".json":
        if variant:
            raise InputError(f"--config={location}: the config of a run has no variants")
        return _of_experiment(read(path))
    config = _ask(location, path, "get_config", variant)
    if not isinstance(config, ConfigDict):
        raise InputError(f"--config={location}: get_config returned {type(config).__name__}, expected a ConfigDict")
    try:
        _check_sections(config.to_dict())
    except InputError as error:
        raise InputError(f"--config={location}: {error}") from None
    return config


def stated(location: str, name: str) -> typing.Any:
    """What a function of an experiment file returns beside `get_config`: `sweep`, `search`, with or without a variant.

    Raises:
        InputError: as `load`, or the file has no such function.
    """
    file, _, variant = location.partition(":")
    path = pathlib.Path(file)
    if path.suffix == ".json" or not path.is_file():
        raise InputError(f"--config={location}: expected an experiment file with {name}()")
    return _ask(location, path, name, variant)


def _ask(location: str, path: pathlib.Path, function: str, variant: str) -> typing.Any:
    """What a function in a Python file returns; it may do without the variant, `get_config` may not."""
    module_spec = importlib.util.spec_from_file_location(f"experiment_{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise InputError(f"--config={location}: {path} is not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        asked = getattr(module, function, None)
        if asked is None:
            raise InputError(f"--config={location}: {path} defines no {function}(variant)")
        takes = function == "get_config" or inspect.signature(asked).parameters
        return asked(variant) if takes else asked()
    except InputError as error:
        raise InputError(str(error) if str(error).startswith("--config") else f"--config={location}: {error}") from None
    except (Exception, SystemExit) as error:
        lines = [f.lineno for f in traceback.extract_tb(sys.exc_info()[2]) if f.filename == str(path)]
        where = f"{path}:{lines[-1]}" if lines else path
        raise InputError(f"--config={location}: {where}: {_say(error)}") from None


def _of_experiment(experiment: Experiment) -> Config:
    """The config that `resolve` makes this experiment of."""
    config = default_config(experiment.family)
    for path, value in _flatten(dataclasses.asdict(experiment)).items():
        if path == "seed":
            config.seed = value
        elif path != "family":
            _set(config, path, value)
    return config


def override(config: Config, assignments: list[tuple[str, str]]) -> Config:
    """Sets fields from the command line's text, `[("optimizer.learning_rate", "3e-4")]`, by each field's type.

    Raises:
        InputError: no such field (the nearest is named), or text that is not of the field's type.
    """
    for path, text in assignments:
        kind = _kind_at(config, path, source=f"--config.{path}={text}")
        _set(config, path, _parse(text, kind, f"--config.{path}={text}"))
    return config


# --- from ConfigDict to specs and back --------------------------------------------------------------------------------


def resolve(config: Config) -> Experiment:
    """The typed, frozen specs of a config.

    Raises:
        InputError: an unknown or mistyped field, or values that a spec refuses.
    """
    return _build(config.to_dict())


def resolve_preparation(config: Config) -> Preparation:
    """The settings of data in a corpus's config or an experiment's.

    Raises:
        InputError: as `resolve`.
    """
    if config.family != CORPUS:
        return resolve(config).preparation
    values = config.to_dict()
    _check_sections(values)
    return Preparation(**_specs(values))


def save(experiment: Experiment, path: pathlib.Path) -> None:
    """Writes the resolved config as JSON, whole or not at all; `read` makes an equal object from it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(dataclasses.asdict(experiment), indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def read(path: pathlib.Path) -> Experiment:
    """The experiment that `save` wrote.

    Raises:
        InputError: the file is missing or not a resolved config.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path.parent} holds no config.json: it is not a run's folder") from None
    except (ValueError, OSError) as error:
        raise InputError(f"{path}: not a resolved config: {_say(error)}") from None
    try:
        return _build(_of_today(values))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _of_today(values: typing.Any) -> typing.Any:
    """The values of a run's config with those that older versions wrote otherwise: `model.remat` was true or false."""
    model = values.get("model") if isinstance(values, dict) else None
    if not isinstance(model, dict) or not isinstance(model.get("remat"), bool):
        return values
    return values | {"model": model | {"remat": "all" if model["remat"] else ""}}


def differences(old: Experiment, new: Experiment) -> list[str]:
    """One line for each field in which two experiments differ, `path: old -> new`."""
    before, after = _flatten(dataclasses.asdict(old)), _flatten(dataclasses.asdict(new))
    absent = "(absent)"
    return [
        f"{path}: {before.get(path, absent)!r} -> {after.get(path, absent)!r}"
        for path in sorted(before | after)
        if before.get(path, absent) != after.get(path, absent)
    ]


def _check_sections(values) -> None:
    """Raises InputError unless `values` holds the family, the seed and a dict for each room, and nothing else."""
    if not isinstance(values, dict):
        raise InputError(f"expected a config, got {type(values).__name__}")
    rooms = _rooms(values.get("family"))
    needed = [*([] if values.get("family") == CORPUS else ["seed"]), *rooms]
    expected = {"family", *needed}
    for name in values:
        if name not in expected:
            raise InputError(f"unknown section {name!r}; there are {_choices(name, expected)}")
    for name in needed:
        if name not in values:
            raise InputError(f"{name} is missing")
    for room in rooms:
        if not isinstance(values[room], dict):
            raise InputError(f"{room}={values[room]!r}: expected a section of fields")


def _build(values: dict) -> Experiment:
    _check_sections(values)
    family = values["family"]
    if family == CORPUS:
        raise InputError("a corpus's config has no model to train; llm.prepare runs it")
    return Experiment(family=str(family), seed=int(_convert(values["seed"], int, "seed")), **_specs(values))


def _specs(values: dict) -> dict[str, typing.Any]:
    """The spec of each room."""
    built = {}
    for room, spec in _rooms(values["family"]).items():
        kinds = _fields(spec)
        for name in values[room]:
            if name not in kinds:
                raise InputError(f"unknown field {room}.{name}; {room} has {_choices(name, kinds)}")
        missing = kinds.keys() - values[room].keys()
        # A field that is younger than a run's config.json is at its default there; but weights mean nothing without the
        # settings of their model, where only what is off by default may be missing.
        off = {field.name for field in dataclasses.fields(spec) if field.default is None}
        if room == "model" and missing - off:
            raise InputError(f"{room}.{min(missing - off)} is missing")
        built[room] = spec(
            **{name: _convert(value, kinds[name], f"{room}.{name}") for name, value in values[room].items()}
        )
    return built


def _rooms(family) -> dict[str, type]:
    if family == CORPUS:
        return CORPUS_ROOMS
    if family not in models.FAMILIES:
        raise InputError(f"family={family!r}: there are {_choices(str(family), [*models.FAMILIES, CORPUS])}")
    return {"model": models.FAMILIES[family].spec, **ROOMS}


def _fields(spec: type) -> dict[str, typing.Any]:
    hints = typing.get_type_hints(spec)
    return {field.name: hints[field.name] for field in dataclasses.fields(spec)}


def _flatten(values: dict, prefix: str = "") -> dict:
    flat = {}
    for name, value in values.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


# --- fields, types, messages ------------------------------------------------------------------------------------------


def _choices(wrong: str, names: typing.Iterable[str]) -> str:
    names = sorted(names)
    nearest = difflib.get_close_matches(wrong, names, n=1, cutoff=0.5)
    return (f"{nearest[0]!r} (nearest), " if nearest else "") + ", ".join(n for n in names if n not in nearest)


def _say(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _kind_at(config: Config, path: str, source: str):
    """The type of the field at `room.name` (or of `seed`)."""
    rooms = _rooms(config.family)
    if path == "seed" and "seed" in config:
        return int
    room, _, name = path.partition(".")
    if path == "family" or (room in rooms and not name):
        raise InputError(f"{source}: {path} is set by the config file, not by an override")
    if room not in rooms:
        every = [f"{r}.{f}" for r, spec in rooms.items() for f in _fields(spec)]
        by_field = [p for p in every if p.endswith(f".{path}")]
        hint = repr(by_field[0]) + " (nearest)" if by_field else _choices(path, ["seed", *rooms])
        raise InputError(f"{source}: there is no field {path!r}; there are {hint}")
    kinds = _fields(rooms[room])
    if name not in kinds:
        raise InputError(f"{source}: {room} has no field {name!r}; it has {_choices(name, kinds)}")
    return kinds[name]


def _set(config: Config, path: str, value) -> None:
    _kind_at(config, path, source=path)
    *rooms, name = path.split(".")
    section: typing.Any = config
    for room in rooms:
        section = section[room]
    try:
        section[name] = value
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}={value!r}: {_say(error)}") from None


def _optional(kind) -> bool:
    return isinstance(kind, types.UnionType) and type(None) in typing.get_args(kind)


def _inner(kind):
    """The type behind `X | None`; tuple for `tuple[X, ...]`."""
    if _optional(kind):
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    return typing.get_origin(kind) or kind


def _element(kind) -> type:
    if _optional(kind):
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    return typing.get_args(kind)[0]


def _name(kind) -> str:
    names = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
    text = f"a tuple of {_element(kind).__name__}" if _inner(kind) is tuple else names[_inner(kind)]
    return f"{text} or None" if _optional(kind) else text


def _parse(text: str, kind, source: str) -> typing.Any:
    """A field's value from the command line's text."""
    wrong = InputError(f"{source}: expected {_name(kind)}")
    base = _inner(kind)
    if text.lower() == "none":
        if not _optional(kind):
            raise wrong
        return None
    if base is tuple:
        element = _element(kind)
        try:
            literal = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            literal = None
        if isinstance(literal, (tuple, list)):  # quotes keep the commas of a text
            return tuple(_convert(value, element, source) for value in literal)
        body = text.strip()
        if body[:1] in ("(", "[") and body[-1:] in (")", "]"):
            body = body[1:-1]
        return tuple(_parse(p.strip(), element, source) for p in body.split(",") if p.strip())
    if base is bool:
        if text.lower() not in ("true", "false"):
            raise wrong
        return text.lower() == "true"
    if base is str:
        return text
    try:
        value = base(text)
    except ValueError:
        raise wrong from None
    if base is float and not math.isfinite(value):
        raise wrong
    return value


def _convert(value, kind, path: str) -> typing.Any:
    """A field's value checked against its type; integers become floats, lists tuples."""
    wrong = InputError(f"{path}={value!r}: expected {_name(kind)}")
    base = _inner(kind)
    if value is None:
        if not _optional(kind):
            raise wrong
        return None
    if base is tuple:
        if not isinstance(value, (tuple, list)):
            raise wrong
        return tuple(_convert(v, _element(kind), path) for v in value)
    if base is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, base) or (base is not bool and isinstance(value, bool)):
        raise wrong
    if base is float and not math.isfinite(value):
        raise wrong
    return value
