"""The page of a plan: what a compiled step is, needs, sends, and at best takes."""

import collections
from typing import Any

from llm.config import Experiment
from llm.devices import GIB, Device, published
from llm.errors import RunFailed
from llm.planning.collectives import Collective, collectives
from llm.planning.program import Program
from llm.planning.roofline import DAY, Roofline, roofline
from llm.planning.traffic import moved

Section = tuple[str, list[tuple[str, str]]]
ASSUMED = (
    "FLOPs are 2 a parameter and token forward, attention whole whatever is masked, and twice that backward; remat "
    "repeats the forward pass, or attention alone where it keeps products",
    "bytes moved are operands and results of every step of the compiled program, a kernel's once each; loops as often "
    "as they run, both branches of a condition",
    "bytes sent are those of ring algorithms; all axes, arithmetic and memory overlap without a gap, which no program "
    "reaches: the times are bounds",
)


def figures(experiment: Experiment, program: Program, budget: float | None) -> dict[str, Any]:
    """All numbers of the page by name: bytes, seconds, FLOPs; those of one device where the name says `_per_device`.

    Args:
        experiment: of the program.
        program: its compiled step.
        budget: tokens of the whole run; None takes the config's steps.
    """
    device = published(program.topology.devices[0].device_kind)
    sent = collectives(program.module, program.mesh)
    bytes_moved = moved(program.module)
    spent = experiment.training.steps * program.tokens if budget is None else budget
    limits = None if device is None else roofline(program, sent, bytes_moved, device)
    return {
        "topology": program.topology.name,
        "devices": len(program.topology.devices),
        "device": program.topology.devices[0].device_kind,
        "mesh": program.mesh,
        "parameters": program.parameters,
        "tokens": program.tokens,
        "flops": program.flops,
        "executed_flops": program.executed,
        "compiler_flops_per_device": program.counted,
        "memory_per_device": program.memory._asdict() | {"peak": program.memory.peak, "state": program.state},
        "capacity_per_device": None if device is None else device.memory,
        "attention": program.attention,
        "sent_per_device": _sums(sent),
        "moved_per_device": bytes_moved,
        "loops_of_unknown_length": program.module.unknown,
        "compile_seconds": program.seconds,
        "budget_tokens": spent,
        "roofline": None if limits is None else _seconds(limits, spent / program.tokens, len(program.topology.devices)),
    }


def _sums(sent: list[Collective]) -> list[dict[str, Any]]:
    """Count and bytes by kind and axes, the most bytes first."""
    times: dict[tuple[str, tuple[str, ...]], float] = collections.defaultdict(float)
    total: dict[tuple[str, tuple[str, ...]], float] = collections.defaultdict(float)
    for one in sent:
        times[one.kind, one.axes] += one.times
        total[one.kind, one.axes] += one.sent
    return [
        {"kind": kind, "axes": list(axes), "times": round(times[kind, axes]), "bytes": total[kind, axes]}
        for kind, axes in sorted(total, key=lambda key: (-total[key], key))
    ]


def _seconds(limits: Roofline, steps: float, devices: int) -> dict[str, Any]:
    days = steps * limits.step / DAY
    return {
        "arithmetic_seconds": limits.arithmetic,
        "memory_seconds": limits.memory,
        "network_seconds": limits.network,
        "step_seconds": limits.step,
        "mfu_bound": limits.mfu,
        "steps": steps,
        "days": days,
        "device_hours": 24 * days * devices,
    }


def sections(experiment: Experiment, found: dict[str, Any], device: Device | None) -> list[Section]:
    """The page's parts, each a title and rows of name and value, from `figures`."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in found["mesh"].items() if size > 1) or "one device"
    training, name = experiment.training, found["device"] if device is None else device.name
    batch = f"{training.batch_size:,} rows, {found['tokens']:,} tokens"
    if training.microbatches > 1:
        batch += f", in {training.microbatches} micro-batches"
    memory = found["memory_per_device"]
    program = [
        ("hardware", f"{found['topology']}: {found['devices']:,} x {name}"),
        ("mesh", mesh),
        ("batch", batch),
        ("parameters", f"{found['parameters']:,}"),
        ("FLOPs a step", f"{found['flops']:.3e}, with remat {found['executed_flops']:.3e}"),
        ("attention", found["attention"]),
        ("compiled in", f"{found['compile_seconds']:.0f} s"),
    ]
    if found["executed_flops"] == found["flops"]:
        program[4] = ("FLOPs a step", f"{found['flops']:.3e}")
    if found["compiler_flops_per_device"] is not None:
        counted = f"{found['compiler_flops_per_device']:.3e} a device, loops once and kernels not at all"
        program.insert(5, ("the compiler counts", counted))
    held = [
        ("arguments", f"{_gib(memory['arguments'])}, of it parameters and optimizer {_gib(memory['state'])}"),
        ("temporaries", _gib(memory["temporaries"])),
        ("outputs not in place", _gib(memory["outputs"] - memory["aliased"])),
        ("peak", _gib(memory["peak"])),
    ]
    if memory["compiler_peak"] is not None:
        held.append(("the compiler's own peak", _gib(memory["compiler_peak"])))
    if device is not None:
        held.append(("of its memory", f"{memory['peak'] / device.memory:.0%} of {_gib(device.memory)}"))
    sent = [
        (f"{row['kind']}, {'+'.join(row['axes'])}", f"{row['times']:>6,} times  {_gib(row['bytes']):>12}")
        for row in found["sent_per_device"]
    ]
    parts = [
        ("Program", program),
        ("Memory of a device", held),
        ("Sent by a device in a step", sent or [("nothing", "")]),
    ]
    if device is not None:
        parts += _times(found, device)
    if found["loops_of_unknown_length"]:
        parts.append(("Not known", [("loops counted once", ", ".join(found["loops_of_unknown_length"]))]))
    return parts


def _times(found: dict[str, Any], device: Device) -> list[Section]:
    limits, sent = found["roofline"], dict.fromkeys(found["roofline"]["network_seconds"], 0.0)
    for row in found["sent_per_device"]:
        sent["+".join(row["axes"])] += row["bytes"]
    seconds = [
        ("arithmetic", f"{limits['arithmetic_seconds']:.4f} s at {device.flops / 1e12:,.0f} TFLOP/s a device"),
        (
            "memory",
            f"{limits['memory_seconds']:.4f} s, {found['moved_per_device'] / 1e9:,.1f} GB at "
            f"{device.memory_bandwidth / 1e9:,.0f} GB/s",
        ),
        *(
            (f"network, {axes}", f"{time:.4f} s at {sent[axes] / time / 1e9:,.0f} GB/s")
            for axes, time in sorted(limits["network_seconds"].items(), key=lambda row: -row[1])
        ),
        ("step", f"{limits['step_seconds']:.4f} s or more"),
        ("bound on MFU", f"{limits['mfu_bound']:.0%}"),
    ]
    budget = [
        ("tokens", f"{found['budget_tokens']:,.0f} in {limits['steps']:,.0f} steps"),
        ("days", f"{limits['days']:,.1f} or more"),
        ("device-hours", f"{limits['device_hours']:,.0f} or more"),
    ]
    figures_from = [("data sheet", device.source), *(("assumed", text) for text in ASSUMED)]
    return [("At best", seconds), ("Token budget", budget), ("By", figures_from)]


def check_fits(found: dict[str, Any]) -> None:
    """Raises RunFailed when the program needs more memory than the data sheet gives a device."""
    need, capacity = found["memory_per_device"]["peak"], found["capacity_per_device"]
    if capacity is not None and need > capacity:
        raise RunFailed(f"it does not fit: {_gib(need)} of {_gib(capacity)}; --suggest ranks the meshes that fit")


def _gib(size: float) -> str:
    """Bytes to be read: in GiB, small ones in MiB."""
    return f"{size / GIB:,.2f} GiB" if size >= GIB / 100 else f"{size / 2**20:,.3f} MiB"
