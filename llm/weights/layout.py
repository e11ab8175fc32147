"""Carrying tensors between a checkpoint of others and our parameters, by one table of names for both directions.

A table is a list of `Row`s. Theirs are single tensors, a layer or an expert each; ours are stacked, with the layers
leading. A row with {i} in its name stands for one tensor a layer, one with {e} for one an expert.
"""

import dataclasses
import fnmatch
import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from llm.errors import InputError
from llm.weights.sources import Tensor

Shapes = Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor of theirs and what it is here.

    Attributes:
        theirs: its name, with {i} for the layer and {e} for the expert.
        ours: the parameter's path, without its number of layer; several where theirs holds several side by side.
        transposed: theirs is (outputs, inputs), as torch's linear layers are; ours are inputs first.
        inputs: leading axes of ours that are the inputs of a matrix; None is a vector.
        order: ours[..., j] is theirs[..., order[j]]; () keeps the order.
        head: the name of the head that it belongs to, which a checkpoint may lack as a whole; "" is no head.
    """

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False
    inputs: int | None = 1
    order: tuple[int, ...] = ()
    head: str = ""


def linear(theirs: str, ours: str, bias: bool = True, inputs: int = 1, **more) -> list[Row]:
    """The rows of a linear layer of torch: `theirs`.weight and .bias, `ours`/kernel and /bias."""
    rows = [Row(f"{theirs}.weight", (f"{ours}/kernel",), True, inputs, **more)]
    return rows + ([Row(f"{theirs}.bias", (f"{ours}/bias",), inputs=None, **more)] if bias else [])


def norm(theirs: str, ours: str, bias: bool = True, **more) -> list[Row]:
    """The rows of a norm: `theirs`.weight and .bias, `ours`/scale and /bias."""
    rows = [Row(f"{theirs}.weight", (f"{ours}/scale",), inputs=None, **more)]
    return rows + ([Row(f"{theirs}.bias", (f"{ours}/bias",), inputs=None, **more)] if bias else [])


@dataclasses.dataclass(frozen=True)
class Table:
    """The names of a family.

    Attributes:
        rows: all of them.
        prefix: what begins the names of a model with a head and is missing where the bare model was saved.
        same: tensors that repeat another, {repeated name: name}; they must be equal to it.
        computed: patterns of tensors that are no parameters: buffers that anyone can compute.
        unread: patterns of tensors that this objective has no use for; an import says so.
        renamed: ends of names, {old end: end}.
        windows: the length of the pattern of layers (`llm.nn.stack.Stack`).
        unwritten: our parameters that no tensor is written of.
    """

    rows: Sequence[Row]
    prefix: str = ""
    same: Mapping[str, str] = dataclasses.field(default_factory=dict)
    computed: Sequence[str] = ()
    unread: Sequence[str] = ()
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    windows: int = 1
    unwritten: frozenset[str] = frozenset()

    def without(self, heads: Collection[str]) -> "Table":
        """The table without the rows of some heads, whose parameters are then not written."""
        rows = [row for row in self.rows if row.head not in heads]
        unwritten = {path for row in self.rows if row.head in heads for path in row.ours}
        return dataclasses.replace(self, rows=rows, unwritten=frozenset(unwritten))


class _Place(NamedTuple):
    """One tensor of theirs, and the parts of ours that it fills: (path, index of leading axes)."""

    theirs: str
    row: Row
    parts: tuple[tuple[str, tuple[int, ...]], ...]


class Loaded(NamedTuple):
    """What an import found: our arrays by path, heads that the checkpoint lacks, tensors that nothing reads.

    Each array is read when it is asked for, and again when it is asked for again.
    """

    arrays: Mapping[str, np.ndarray]
    missing_heads: tuple[str, ...]
    unread: tuple[str, ...]


def load(table: Table, tensors: Mapping[str, Tensor], shapes: Shapes) -> Loaded:
    """Our parameters from theirs. Everything is checked by name and shape here; numbers are read when asked for.

    Args:
        table: the family's names.
        tensors: of the checkpoint.
        shapes: of our parameters, by path.

    Raises:
        InputError: a tensor is missing, is of another shape, or has a name that the table does not know; ours that no
            row fills.
    """
    tensors = _named(table, tensors)
    wanted = list(_places(table, shapes))
    heads = {p.row.head for p in wanted if p.row.head}
    missing_heads = {h for h in heads if not any(p.theirs in tensors for p in wanted if p.row.head == h)}
    wanted = [p for p in wanted if p.row.head not in missing_heads]
    names = {p.theirs for p in wanted}
    _refuse("lacks", [name for name in names if name not in tensors])
    rest = [name for name in tensors if name not in names and name not in table.same]
    rest = [name for name in rest if not any(fnmatch.fnmatch(name, pattern) for pattern in table.computed)]
    unread = [name for name in rest if any(fnmatch.fnmatch(name, pattern) for pattern in table.unread)]
    _refuse("has, and this model has no place for,", [name for name in rest if name not in unread])
    for place in wanted:
        expected = _their_shape(place, shapes)
        if tensors[place.theirs].shape != expected:
            raise InputError(f"{place.theirs} has shape {tensors[place.theirs].shape}, the config says {expected}")
    filled = {path for p in wanted for path, _ in p.parts}
    fresh = {path for p in _places(table, shapes) if p.row.head in missing_heads for path, _ in p.parts}
    assert filled | fresh == set(shapes), f"no row fills {sorted(set(shapes) - filled - fresh)}"

    for repeated, name in table.same.items():
        if repeated in tensors and not np.array_equal(tensors[repeated].read(), tensors[name].read()):
            raise InputError(f"{repeated} differs from {name}, which the config says it is tied to")
    arrays = _Arrays(wanted, tensors, {path: shapes[path] for path in sorted(filled)})
    return Loaded(arrays, tuple(sorted(missing_heads)), tuple(sorted(unread)))


class _Arrays(Mapping[str, np.ndarray]):
    """Our arrays by path, each made of the tensors that fill it when it is asked for."""

    def __init__(self, places: Sequence[_Place], tensors: Mapping[str, Tensor], shapes: Shapes):
        self._tensors, self._shapes = tensors, shapes
        self._places: dict[str, list[_Place]] = {path: [] for path in shapes}
        for place in places:
            for path, _ in place.parts:
                self._places[path].append(place)

    def __getitem__(self, path: str) -> np.ndarray:
        made = np.empty(self._shapes[path], np.float32)
        for place in self._places[path]:
            whole = self._tensors[place.theirs].read()
            for (mine, index), part in zip(place.parts, _to_ours(place, whole, self._shapes)):
                if mine == path:
                    made[index] = part
        return made

    def __contains__(self, path: object) -> bool:
        return path in self._shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def tensors_of(
    table: Table, shapes: Shapes, read: Callable[[str], np.ndarray], bare: bool = False
) -> dict[str, Tensor]:
    """Their tensors from ours, by name: what `load` reads back bit by bit.

    Those of one parameter follow each other, and it is kept until another is wanted: read in this order, they take the
    memory of one parameter, or of those that lie side by side in one tensor.

    Args:
        table: the family's names.
        shapes: of our parameters, by path.
        read: path -> the parameter.
        bare: leaves the prefix out, as a model without a head is saved.

    Raises:
        InputError: a parameter has no place there.
    """
    lost = set(shapes) - {path for place in _places(table, shapes) for path, _ in place.parts} - table.unwritten
    if lost:
        raise InputError(f"their models have no place for {', '.join(sorted(lost)[:4])}; it cannot be written")
    kept: dict[str, np.ndarray] = {}

    def numbers(place: _Place) -> np.ndarray:
        wanted = [path for path, _ in place.parts]
        for other in kept.keys() - set(wanted):
            del kept[other]
        for path in wanted:
            if path not in kept:
                kept[path] = read(path)
        return _to_theirs(place, kept)

    places = sorted(_places(table, shapes), key=lambda place: [path for path, _ in place.parts])
    return {
        place.theirs.removeprefix(table.prefix) if bare else place.theirs: Tensor(
            _their_shape(place, shapes), functools.partial(numbers, place)
        )
        for place in places
    }


def _refuse(what: str, names: list[str]) -> None:
    if names:
        names = sorted(names)
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        raise InputError(f"the checkpoint {what} {', '.join(names[:4])}{more}")


def _named(table: Table, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by the table's names: with its prefix, and with today's ends of names."""
    bare = not any(name.startswith(table.prefix) for name in tensors)
    full = {row.theirs.split("{")[0] for row in table.rows} | set(table.same) if bare else set()

    def named(name: str) -> str:
        for old, end in table.renamed.items():
            if name.endswith(old):
                name = name.removesuffix(old) + end
        known = any(name.startswith(start) for start in full)
        return table.prefix + name if bare and not known else name

    found = {named(name): tensor for name, tensor in tensors.items()}
    for repeated, name in table.same.items():  # of tensors that are one, a file may have kept either name
        if name not in found and repeated in found:
            found[name] = found[repeated]
    return found


def _places(table: Table, shapes: Shapes) -> Iterator[_Place]:
    """All tensors of theirs whose rows have parameters here, in order."""
    for row in table.rows:
        layers, experts = _counts(table, row, shapes)
        if layers is None:
            continue
        for i in range(layers):
            for e in range(experts):
                parts = tuple(_part(table, row, path, i, e) for path in row.ours)
                yield _Place(row.theirs.replace("{i}", str(i)).replace("{e}", str(e)), row, parts)


def _part(table: Table, row: Row, path: str, i: int, e: int) -> tuple[str, tuple[int, ...]]:
    index: tuple[int, ...] = ()
    if "{i}" in row.theirs:
        index = (i // table.windows,)
        if table.windows > 1:
            path = path.replace("/layers/", f"/layers/block_{i % table.windows}/")
    return path, (*index, e) if "{e}" in row.theirs else index


def _counts(table: Table, row: Row, shapes: Shapes) -> tuple[int | None, int]:
    """(layers, experts) that a row stands for; None where this model has no such parameter."""
    path, _ = _part(table, row, row.ours[0], 0, 0)
    if path not in shapes:
        return None, 0
    shape = shapes[path]
    layers = shape[0] * table.windows if "{i}" in row.theirs else 1
    return layers, shape[1] if "{e}" in row.theirs else 1


def _part_shape(part: tuple[str, tuple[int, ...]], shapes: Shapes) -> tuple[int, ...]:
    path, index = part
    return shapes[path][len(index) :]


def _fan_in(row: Row, shape: tuple[int, ...]) -> int:
    return math.prod(shape[: row.inputs])


def _their_shape(place: _Place, shapes: Shapes) -> tuple[int, ...]:
    row = place.row
    ours = [_part_shape(part, shapes) for part in place.parts]
    if row.inputs is None:
        return (sum(map(math.prod, ours)),)
    inputs = _fan_in(row, ours[0])
    outputs = sum(math.prod(shape) // inputs for shape in ours)
    return (outputs, inputs) if row.transposed else (inputs, outputs)


def _to_ours(place: _Place, whole: np.ndarray, shapes: Shapes) -> list[np.ndarray]:
    row, found, start = place.row, [], 0
    whole = whole.T if row.transposed else whole
    for part in place.parts:
        shape = _part_shape(part, shapes)
        width = math.prod(shape) // (1 if row.inputs is None else _fan_in(row, shape))
        mine, start = whole[..., start : start + width].reshape(shape), start + width
        found.append(mine[..., list(row.order)] if row.order else mine)
    return found


def _to_theirs(place: _Place, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    row, parts = place.row, []
    for path, index in place.parts:
        part = arrays[path][index]
        part = part[..., np.argsort(row.order)] if row.order else part
        parts.append(part.reshape(-1) if row.inputs is None else part.reshape(_fan_in(row, part.shape), -1))
    whole = np.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]
    return np.ascontiguousarray(whole.T if row.transposed else whole)
