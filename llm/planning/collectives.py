"""What the devices of a mesh send each other in one run of a compiled program."""

import re
from typing import NamedTuple

import numpy as np

from llm.planning.hlo import Instruction, Module

# Bytes that a device sends for each byte of its operand, in a group of n, by the algorithms of a ring.
SENT = {
    "all-gather": lambda n: n - 1.0,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "collective-broadcast": lambda n: 1.0,
    "collective-permute": lambda n: 1.0,
}


class Collective(NamedTuple):
    """One collective of a program.

    Attributes:
        kind: a key of SENT.
        axes: the mesh axes along which the devices of a group differ.
        group: the places in the mesh of the devices of one group; of a permutation, of all that send.
        times: how often it runs.
        operand: bytes that a device gives to it each time.
    """

    kind: str
    axes: tuple[str, ...]
    group: tuple[int, ...]
    times: float
    operand: float

    @property
    def sent(self) -> float:
        """Bytes that a device sends in all."""
        return self.times * self.operand * SENT[self.kind](len(self.group))


def collectives(module: Module, mesh_shape: dict[str, int]) -> list[Collective]:
    """All collectives of a program compiled for a mesh, but those of a device with itself.

    Args:
        module: the program.
        mesh_shape: sizes of the mesh's axes by name; the places of groups are counted along them, the last the fastest.
    """
    found, chains = [], set()
    for name, instructions in module.computations.items():
        for instruction in instructions.values():
            kind = instruction.opcode.removesuffix("-start")
            if kind not in SENT or not module.times[name]:
                continue
            # One that a TPU runs beside other work is written once for its start, its middle and its end.
            if chain := re.search(r'chain_id="(\d+)"', instruction.attributes):
                if chain[1] in chains:
                    continue
                chains.add(chain[1])
            # Its halves are fused: what is summed is cut before it is sent on.
            if kind == "all-reduce" and "all-reduce-scatter" in name:
                kind = "reduce-scatter"
            if kind == "collective-permute":
                pairs = [pair for pair in _pairs(instruction) if pair[0] != pair[1]]
                axes, group = _axes(pairs, mesh_shape), tuple(pair[0] for pair in pairs)
            else:
                groups = replica_groups(instruction.attributes, int(np.prod(list(mesh_shape.values()))))
                axes, group = _axes(groups, mesh_shape), tuple(groups[0])
            if axes:
                operand = sum(instructions[operand].bytes for operand in instruction.operands)
                found.append(Collective(kind, axes, group, module.times[name], operand))
    return found


def replica_groups(attributes: str, devices: int) -> list[list[int]]:
    """The groups of a collective, in any of the forms that XLA writes.

    `{{0,1},{2,3}}`; `[2,4]<=[4,2]T(1,0)`, a number of groups and their size, of 0, 1, ... reshaped and transposed;
    `mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}`, a mesh and the axes that are joined; `{}`, one group of all.

    Raises:
        ValueError: another form.
    """
    start = attributes.find("replica_groups=")
    text = attributes[start + len("replica_groups=") :]
    if start < 0 or text.startswith("{}"):
        return [list(range(devices))]
    if text.startswith("{{"):
        return [
            [int(x) for x in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", text[: text.index("}}") + 1])
        ]
    if iota := re.match(r"\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text):
        return _iota(iota[3]).reshape(int(iota[1]), int(iota[2])).tolist()
    if named := re.match(r"mesh\[([^\]]*)\](?:, device_ids=\((\[[\d,]+\](?:T\([\d,]+\))?)\))? \{([^}]*)\}", text):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        ids = np.arange(devices) if named[2] is None else _iota(named[2])
        return _along(ids, sizes, re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", named[3]))
    raise ValueError(f"replica_groups in a form that is not known here: {text[:80]}")


def _iota(text: str) -> np.ndarray:
    """`[4,2]T(1,0)`: 0, 1, ... in this shape, its axes transposed, flat."""
    shape, _, order = text.partition("T")
    numbers = [int(x) for x in shape.strip("[]").split(",")]
    ids = np.arange(np.prod(numbers)).reshape(numbers)
    return (ids.transpose([int(x) for x in order.strip("()").split(",")]) if order else ids).reshape(-1)


def _along(ids: np.ndarray, sizes: dict[str, int], joined: list[tuple[str, str, str]]) -> list[list[int]]:
    """Groups along named axes of a mesh, or along parts of them: 'a':(2)4 is 4 of it, behind 2."""
    shape: list[int] = []
    inner = []
    for name, size in sizes.items():
        parts = sorted((int(before), int(part)) for axis, before, part in joined if axis == name and before)
        if any(axis == name and not before for axis, before, _ in joined):
            inner.append(len(shape))
            shape.append(size)
            continue
        done = 1
        for before, part in parts:
            shape.append(before // done)
            inner.append(len(shape))
            shape.append(part)
            done = before * part
        shape.append(size // done)
    outer = [axis for axis in range(len(shape)) if axis not in inner]
    members = int(np.prod([shape[axis] for axis in inner]))
    return ids.reshape(shape).transpose(outer + inner).reshape(-1, members).tolist()


def _pairs(instruction: Instruction) -> list[list[int]]:
    found = re.search(r"source_target_pairs=\{(.*?)\}\}", instruction.attributes)
    assert found is not None
    return [[int(x) for x in pair.split(",")] for pair in re.findall(r"\{([\d,]+)", found[0])]


def _axes(groups: list[list[int]], mesh_shape: dict[str, int]) -> tuple[str, ...]:
    """The axes along which the members of any group differ."""
    sizes = tuple(mesh_shape.values())
    differ = np.zeros(len(sizes), bool)
    for group in groups:
        places = np.array(np.unravel_index(group, sizes))
        differ |= (places != places[:, :1]).any(axis=1)
    return tuple(name for name, differs in zip(mesh_shape, differ) if differs)
