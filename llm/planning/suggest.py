"""Meshes ranked for an experiment and a topology: all by an estimate, the best few by compiling them."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from llm.config import Experiment
from llm.devices import GIB, published
from llm.errors import InputError, RunFailed
from llm.planning.estimate import SPLIT, Estimate, estimates
from llm.planning.page import figures
from llm.planning.program import DoesNotFit, compile_program
from llm.planning.topology import Topology
from llm.sharding import MeshSpec


class Suggestion(NamedTuple):
    """One mesh that fits.

    Attributes:
        mesh: sizes of its axes by name.
        memory: peak bytes of a device.
        seconds: of a step, at best.
        mfu: the bound on MFU.
        compiled: whether the figures are of the compiled program, or estimated.
    """

    mesh: dict[str, int]
    memory: float
    seconds: float
    mfu: float
    compiled: bool


def ranked(experiment: Experiment, topology: Topology, count: int, say: Callable[[str], None]) -> list[Suggestion]:
    """The meshes that fit, of which the best `count` are compiled and come first; the shortest step first.

    A program that is compiled also says how large activations really are, by which all estimates are scaled from then
    on.

    Raises:
        InputError: hardware without a data sheet, or no mesh that divides the batch and the model.
        RunFailed: no mesh fits.
    """
    kind = topology.devices[0].device_kind
    device = published(kind)
    if device is None:
        raise InputError(f"--suggest ranks by data sheets, and there is none of {kind}")
    left = estimates(experiment, len(topology.devices), device)
    if not left:
        raise InputError(
            f"--suggest: no mesh of {len(topology.devices)} devices divides training.batch_size="
            f"{experiment.training.batch_size} and the axes of the model"
        )
    compiled: list[Suggestion] = []
    scale = 1.0

    def needed(one: Estimate) -> float:
        return one.known + scale * one.activations

    while len(compiled) < count:
        fitting = [one for one in left if needed(one) <= device.memory]
        if not fitting:
            break
        best = min(fitting, key=lambda one: (one.seconds, one.sent))
        left.remove(best)
        say(f"compiling {name(_sizes(best.mesh))}, estimated at {needed(best) / GIB:.2f} GiB")
        there = dataclasses.replace(experiment, mesh=best.mesh)
        try:
            found = figures(there, compile_program(there, topology), None)
        except DoesNotFit as error:
            say(str(error))
            # It does not say by how much activations were taken for too small; at least by what was thought to be free.
            scale = max(1.25 * scale, (device.memory - best.known) / best.activations)
            continue
        peak, limits = found["memory_per_device"]["peak"], found["roofline"]
        scale = max(peak - best.known, 0.0) / best.activations
        if peak <= device.memory:
            sizes = _sizes(best.mesh)
            compiled.append(Suggestion(sizes, peak, limits["step_seconds"], limits["mfu_bound"], True))
    rest = [
        Suggestion(_sizes(one.mesh), needed(one), one.seconds, one.model / one.seconds, False)
        for one in sorted(left, key=lambda one: (one.seconds, one.sent))
        if needed(one) <= device.memory
    ]
    if not compiled:
        raise RunFailed(
            f"no mesh of {topology.name} fits into {device.memory / GIB:.1f} GiB a device; more devices, "
            "model.remat=all, training.microbatches and training.loss_chunk need less"
        )
    return sorted(compiled, key=lambda one: one.seconds) + rest


def table(suggestions: list[Suggestion], most: int = 12) -> list[str]:
    """Lines of the best `most`."""
    shown = suggestions[:most]
    width = max(len(name(one.mesh)) for one in shown)
    lines = [f"{'mesh':{width}}{'GiB a device':>14}{'step, s':>11}{'MFU at most':>13}  figures"]
    for one in shown:
        row = f"{name(one.mesh):{width}}{one.memory / GIB:>14.2f}{one.seconds:>11.4f}{one.mfu:>13.0%}"
        lines.append(f"{row}  {'compiled' if one.compiled else 'estimated'}")
    if len(suggestions) > most:
        lines.append(f"and {len(suggestions) - most} more, estimated to fit")
    lines.append(
        "estimated: parameters, optimizer and gradients counted, activations by a formula scaled to the last compiled "
        "mesh; the time is that of arithmetic and network alone"
    )
    return lines


def name(mesh: dict[str, int]) -> str:
    """A mesh as the flags that set it."""
    return " ".join(f"--config.mesh.{axis}={size}" for axis, size in mesh.items())


def _sizes(mesh: MeshSpec) -> dict[str, int]:
    return {axis: getattr(mesh, axis) for axis in SPLIT}
