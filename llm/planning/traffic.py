"""What one run of a compiled program reads from and writes to a device's main memory."""

from llm.planning.collectives import SENT
from llm.planning.hlo import Array, Instruction, Module, called

# They name what is already there, or their work is that of the computations that they call.
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "opt-barrier", "domain", "async-start",
}  # fmt: skip
SLICES = {"dynamic-slice", "gather", "slice"}


def moved(module: Module) -> float:
    """Bytes read and written in all, by the size of the operands and results of every step.

    A slice counts as itself and not as the array that it is of, whether it is read or written. A custom call, a kernel
    of ours among them, counts each operand once, however often it reads it. What lies on the chip does not count.
    """
    total = 0.0
    for name in module.straight:
        computation = module.computations[name]
        total += module.times[name] * sum(_step(x, computation, module) for x in computation.values())
    return total


def _size(arrays) -> float:
    return sum(array.bytes for array in arrays if array.in_memory)


def _step(x: Instruction, computation: dict[str, Instruction], module: Module) -> float:
    if x.opcode in FREE or x.opcode.endswith(("-done", "-update")):
        return 0.0
    operands = [computation[name] for name in x.operands]
    if x.opcode == "fusion":
        return _fusion(x, operands, module)
    if x.opcode in ("copy-start", "slice-start"):
        result = x.arrays[1 if x.opcode == "slice-start" else 0]
        return result.bytes * (result.in_memory + _in_memory(operands[0]))
    return _read(x, operands) + _written(x, operands)


def _in_memory(x: Instruction) -> bool:
    return all(array.in_memory for array in x.arrays)


def _read(x: Instruction, operands: list[Instruction]) -> float:
    if x.opcode in SLICES:
        return x.bytes * _in_memory(operands[0]) + sum(_size(o.arrays) for o in operands[1:])
    if x.opcode == "dynamic-update-slice":
        return _size(operands[1].arrays)
    if x.opcode == "scatter":  # adds to what is there
        return sum(_size(o.arrays) for o in operands[1:]) + operands[-1].bytes * _in_memory(operands[0])
    return sum(_size(o.arrays) for o in operands)


def _written(x: Instruction, operands: list[Instruction]) -> float:
    if x.opcode == "dynamic-update-slice":
        return operands[1].bytes * _in_memory(x)
    if x.opcode == "scatter":
        return operands[-1].bytes * _in_memory(x)
    if x.opcode.endswith("-start"):  # the operand stands beside the result
        return max(_size(x.arrays) - sum(_size(o.arrays) for o in operands), 0.0)
    return _size(x.arrays)


def _fusion(x: Instruction, operands: list[Instruction], module: Module) -> float:
    """Of each operand what is read inside, and of the result what is written."""
    body = module.computations[called(x)[0][1]]
    users: dict[str, list[Instruction]] = {name: [] for name in body}
    for inner in body.values():
        for name in inner.operands:
            users[name].append(inner)

    def read(inner: Instruction) -> float:
        total = 0.0
        for use in users[inner.name]:
            if use.opcode in SLICES:
                total += use.bytes
            elif use.opcode == "bitcast" and not use.root:
                total += read(use)
            elif not (_carried(use) or use.opcode == "dynamic-update-slice" and use.operands[0] == inner.name):
                return inner.bytes
        return min(total, inner.bytes)

    def written(array: Array, result: Instruction) -> float:
        while result.opcode == "bitcast":
            result = body[result.operands[0]]
        if _carried(result) or result.opcode in ("parameter", "get-tuple-element"):
            return 0.0
        return body[result.operands[1]].bytes if result.opcode == "dynamic-update-slice" else array.bytes

    inputs = [inner for inner in body.values() if inner.opcode == "parameter"]
    parameters = {inner.attributes[1 : inner.attributes.index(")")]: inner for inner in inputs}
    root = next(inner for inner in body.values() if inner.root)
    results = [body[name] for name in root.operands] if root.opcode == "tuple" else [root] * len(x.arrays)
    total = sum(read(parameters[str(n)]) for n, operand in enumerate(operands) if _in_memory(operand))
    total += sum(written(array, result) for array, result in zip(x.arrays, results) if array.in_memory)
    if "AsyncCollectiveStart" in root.attributes:
        sends = body[root.operands[0]]
        total += _size(sends.arrays) + sum(_size(body[name].arrays) for name in sends.operands)
    return total


def _carried(x: Instruction) -> bool:
    """It hands on the buffers of a collective that runs beside the fusion's own work, which count where it starts."""
    beside = x.opcode == "custom-call" and "AsyncCollective" in x.attributes
    return x.opcode == "tuple" or beside or (x.opcode in SENT and "chain_id=" in x.attributes)
