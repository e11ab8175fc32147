"""What a run has saved, read from its manifests alone: no device is touched, and no array is read."""

import math
import pathlib
from typing import Any

from llm.errors import InputError
from llm.training.checkpoint import fault_of, read_manifest, steps_in


def inspect(workdir: pathlib.Path) -> str:
    """A readable page: every checkpoint, complete or why not, and the arrays of the newest complete one.

    Files are held against their checksums, so this reads as many bytes as were saved.

    Raises:
        InputError: the folder has no checkpoints.
    """
    folder = workdir / "checkpoints"
    lines, newest = [], None
    for step, place in steps_in(folder):
        size = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
        fault = fault_of(place)
        if fault is None:
            newest = step, read_manifest(place)
        lines.append(f"{step:>10}  {_bytes(size):>10}  {_summary(newest[1]) if newest and not fault else fault}")
    others = [p.name for p in sorted(folder.iterdir()) if not p.name.isdigit()] if folder.is_dir() else []
    lines += [f"{name}: was cut off or set aside, and is left alone" for name in others]
    if not lines:
        raise InputError(f"{workdir} holds no checkpoints")
    lines.insert(0, f"{'step':>10}  {'size':>10}  complete, or why not")
    if newest is None:
        return "\n".join([*lines, "", "no checkpoint is complete: a run starts anew"])
    step, manifest = newest
    arrays = manifest.get("arrays")
    if arrays is None:
        return "\n".join([*lines, "", f"{step} was saved before manifests listed arrays"])
    for part, names in _parts(arrays).items():
        count = sum(math.prod(arrays[name][0]) for name in names)
        lines += ["", f"{part} of {step}: {len(names)} arrays, {count:,} numbers"]
        width = max(map(len, names))
        for name in names:
            shape, dtype, place = arrays[name]
            split = ", ".join(f"{n}: {axes}" for n, axes in enumerate(place) if axes)
            lines.append(f"  {name:<{width}}  {'x'.join(map(str, shape)) or '-':<12}  {dtype:<9}  {split}".rstrip())
    facts = manifest["facts"]
    lines += ["", *(f"{name}: {value}" for name, value in _told(facts).items())]
    return "\n".join(lines)


def _summary(manifest: dict) -> str:
    shown = {
        name: value
        for name, value in manifest["facts"].get("metrics", {}).items()
        if name == "loss" or name.startswith("validation.")
    }
    return ", ".join(["complete", *(f"{name} {value:.5g}" for name, value in shown.items())])


def _parts(arrays: dict[str, Any]) -> dict[str, list[str]]:
    """The arrays of each part of a state, "params" first, in the order that they were saved."""
    found: dict[str, list[str]] = {"params": []}
    for name in arrays:
        found.setdefault(name.partition("/")[0], []).append(name)
    return {part: names for part, names in found.items() if names}


def _told(facts: dict[str, Any]) -> dict[str, Any]:
    told = {name: value for name, value in facts.items() if name not in ("metrics", "fingerprints")}
    told |= {f"{name}'s fingerprint": value for name, value in facts["fingerprints"].items()}
    return told | facts.get("metrics", {})


def _bytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
