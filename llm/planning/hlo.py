"""A compiled program's text (XLA's HLO): its instructions, the bytes of its arrays, and how often each part runs."""

import math
import re
from typing import NamedTuple

_BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0, "c64": 64, "c128": 128}
_ARRAY = re.compile(r"(\w+)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_NAMED = re.compile(r"%([\w.\-]+)")
_INSTRUCTION = re.compile(r"\s*(ROOT )?%?([\w.\-]+) = ")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|true_computation|false_computation|branch_computations|called_computations)="
    r"(\{[^}]*\}|%[\w.\-]+)"
)


class Array(NamedTuple):
    """One array: its dtype, its dimensions, and whether it lies in the device's main memory."""

    dtype: str
    dims: tuple[int, ...]
    in_memory: bool

    @property
    def bytes(self) -> float:
        """Its size, without padding."""
        digits = re.sub(r"\D.*", "", self.dtype.lstrip("sufbe"))
        bits = _BITS[self.dtype] if self.dtype in _BITS else int(digits)
        return math.prod(self.dims) * bits / 8


class Instruction(NamedTuple):
    """One instruction: its arrays are those of its result; `operands` are names of the same computation."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    root: bool

    @property
    def bytes(self) -> float:
        """The size of its result."""
        return sum(array.bytes for array in self.arrays)


class Module(NamedTuple):
    """A program.

    Attributes:
        computations: instructions by name, of each computation by name, callees before callers.
        entry: the name of the first one that runs.
        times: how often each computation runs in one run of the program, whoever calls it.
        straight: the computations that run as steps of their own, not as parts of a fusion or of a reduction.
        unknown: names of loops whose length the text does not say; they are taken to run once.
    """

    computations: dict[str, dict[str, Instruction]]
    entry: str
    times: dict[str, float]
    straight: set[str]
    unknown: list[str]


def parse(text: str) -> Module:
    """The module of a compiled program's `as_text()`."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, inside = "", None
    for line in text.splitlines():
        if line.startswith("}"):
            inside = None
        elif inside is None:
            if found := _COMPUTATION.match(line):
                inside = computations[found[2]] = {}
                entry = found[2] if found[1] else entry
        elif found := _INSTRUCTION.match(line):
            inside[found[2]] = _instruction(found[2], line[found.end() :], found[1] is not None)
    times, straight, unknown = _times(computations, entry)
    return Module(computations, entry, times, straight, unknown)


def called(instruction: Instruction) -> list[tuple[str, str]]:
    """(attribute, computation) of each computation that an instruction calls."""
    return [(what, name) for what, names in _CALLED.findall(instruction.attributes) for name in _NAMED.findall(names)]


def _instruction(name: str, text: str, root: bool) -> Instruction:
    """`shape opcode(operands), attributes`; a shape has no blank but within the parentheses of a tuple."""
    end = _closing(text, 0) if text.startswith("(") else text.index(" ")
    opens = text.index("(", end)
    closes = _closing(text, opens)
    arrays = tuple(
        Array(
            dtype,
            tuple(int(size.lstrip("<=")) for size in dims.split(",") if size),
            # Memory space 1 of a TPU is on the chip, 2 and above hold scalars, flags and what the host has.
            re.search(r"S\([1-9]\d*\)", layout) is None,
        )
        for dtype, dims, layout in _ARRAY.findall(text[:end])
    )
    operands = tuple(_NAMED.findall(text[opens:closes]))
    inner = text[opens + 1 : closes - 1]
    attributes = text[closes:] if operands else f"({inner}){text[closes:]}"  # a constant's value
    return Instruction(name, text[end:opens].strip(), arrays, operands, attributes, root)


def _closing(text: str, start: int) -> int:
    """The place behind the parenthesis that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if not depth:
            return place + 1
    raise ValueError(f"a parenthesis is not closed: {text[start : start + 80]}")


def _times(computations, entry: str) -> tuple[dict[str, float], set[str], list[str]]:
    times = dict.fromkeys(computations, 0.0)
    times[entry], straight, unknown = 1.0, {entry}, []
    for caller in reversed(computations):  # callers stand behind what they call
        for instruction in computations[caller].values():
            loops = 1
            if instruction.opcode == "while":
                found = _trip_count(instruction, computations)
                loops = 1 if found is None else found
                unknown += [instruction.name] if found is None else []
            for what, name in called(instruction):
                times[name] += times[caller] * loops
                steps = what in ("body", "condition") or instruction.opcode in ("call", "conditional", "async-start")
                if steps and caller in straight:
                    straight.add(name)
    return times, straight, unknown


def _trip_count(loop: Instruction, computations) -> int | None:
    """What the compiler says of a loop, or the one integer that its condition compares with."""
    if found := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(found[1])
    condition = next(name for what, name in called(loop) if what == "condition")
    constants = [
        int(found[1])
        for instruction in computations[condition].values()
        if instruction.opcode == "constant" and (found := re.match(r"\((\d+)\)", instruction.attributes))
    ]
    return constants[0] if len(constants) == 1 else None
