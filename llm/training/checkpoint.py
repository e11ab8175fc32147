"""Checkpoints: written by orbax in the background, complete only once their manifest stands.

`checkpoints/<step>/` holds `state/`, orbax's arrays, and `manifest.json`, which is written last and lists every array,
and every file with its size and checksum. Of several hosts all write arrays, and process 0 everything else. A folder
without a manifest, or one whose files do not match it, was cut off while it was written: a restart names it, leaves it
and takes the newest complete one.
"""

import asyncio
import concurrent.futures
import dataclasses
import errno
import json
import logging
import math
import os
import pathlib
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.traverse_util
import jax
import numpy as np
import orbax.checkpoint as ocp

from llm.errors import InputError
from llm.sharding import hosts

MANIFEST = "manifest.json"
_TRASH = ".removed-"
# Arrays up to this size together are read at the same time, larger ones each by itself.
_AT_ONCE = 2**26


@dataclasses.dataclass(frozen=True)
class Retention:
    """Which complete checkpoints stay.

    Attributes:
        count: the newest.
        every: those of its multiples, for good; None has none.
        best: the name of a validation's number whose best one stays, "loss" or "accuracy"; "" has none.
    """

    count: int = 1
    every: int | None = None
    best: str = ""

    def better(self, one: float, other: float) -> bool:
        """Whether the first is the better of two numbers named `best`: a loss is low."""
        return one > other if self.best == "accuracy" else one < other

    def value(self, facts: dict) -> float | None:
        """That number of a checkpoint's facts; None where it was not validated, or is not finite."""
        found = facts.get("metrics", {}).get(f"validation.{self.best}")
        return found if isinstance(found, float) and math.isfinite(found) else None

    def stay(self, facts_by_step: dict[int, dict]) -> set[int]:
        """The steps that stay."""
        steps = sorted(facts_by_step)
        kept = set(steps[-self.count :])
        if self.every is not None:
            kept |= {step for step in steps if step % self.every == 0}
        best = self.best_step(facts_by_step)
        return kept if best is None else kept | {best}

    def best_step(self, facts_by_step: dict[int, dict]) -> int | None:
        """The step with the best number, the first of equals."""
        found, best = None, None
        for step in sorted(facts_by_step) if self.best else ():
            value = self.value(facts_by_step[step])
            if value is not None and (best is None or self.better(value, best)):
                found, best = step, value
        return found


@dataclasses.dataclass(frozen=True)
class Later:
    """An array in float32 that is made when it is written and dropped then, so that many need the memory of one."""

    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Its size once it is made."""
        return 4 * math.prod(self.shape)


class _OneByOne(ocp.type_handlers.NumpyHandler):
    """Has orbax make and write the arrays of a state one after the other."""

    def __init__(self):
        super().__init__(deepcopy_host_arrays=False)

    async def serialize(self, values: Sequence[Any], infos, args=None):
        args = args or [ocp.SaveArgs()] * len(values)
        for value, info, arg in zip(values, infos, args):
            for written in await super().serialize([value.make()], [info], [arg]):
                written.result()
        return []


class _Loop(asyncio.SelectorEventLoop):
    """Hears no more once it is closed: after a write that failed, each that is still under way printed a traceback."""

    def call_soon_threadsafe(self, callback, *args, context=None):
        try:
            return super().call_soon_threadsafe(callback, *args, context=context)
        except RuntimeError:
            if not self.is_closed():
                raise


class _Loops(asyncio.DefaultEventLoopPolicy):
    _loop_factory = _Loop


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: the run's `checkpoints/`.
        keep: which complete checkpoints stay, or how many of the newest.
        say: told of every folder that is skipped.
    """

    def __init__(self, folder: pathlib.Path, keep: Retention | int, say: Callable[[str], None] = print):
        self._folder = folder.absolute()
        self._keep = Retention(keep) if isinstance(keep, int) else keep
        self._say = say
        self._faulty: set[int] = set()
        self._told_of_casts = False
        self._writer = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._commit_under_way: concurrent.futures.Future | None = None
        # A failed save is raised by `wait`; its copies in the logs of orbax's threads would only bury that line.
        for name in ("absl", "asyncio"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        asyncio.set_event_loop_policy(_Loops())
        self._orbax = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())

    def save(self, step: int, state: Any, **facts) -> None:
        """Starts writing the state of a step; `facts` (JSON values) go into its manifest.

        Raises:
            OSError: the disk has no room for it.
            OSError, ValueError: an earlier save failed; it is raised by the next `save`, `check` or `wait`.
        """
        self.wait()
        if hosts.from_first(lambda: self._make_place(step, state)):
            self._orbax.save(self._folder / str(step) / "state", args=ocp.args.StandardSave(state))
            self._commit_under_way = self._writer.submit(self._commit, step, _arrays(state), facts)

    def save_one_by_one(self, step: int, state: Any, **facts) -> None:
        """Writes a state whose leaves are `Later`, in the memory of the largest of them; ends when it is written.

        Raises:
            OSError: the disk has no room for it.
            Exception: what the making of an array raises; the checkpoint is then incomplete.
        """
        self.wait()
        if self._make_place(step, state):
            kinds = ocp.type_handlers.create_type_handler_registry((Later, _OneByOne()))
            handler = ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=kinds))
            handler.save(self._folder / str(step) / "state", args=ocp.args.PyTreeSave(state))
            self._commit(step, _arrays(state), facts)

    def _make_place(self, step: int, state: Any) -> bool:
        """Makes the folder of a step; False where a complete one stands already."""
        # Looked at before, because a disk that fills up under orbax's threads makes each of them print a traceback.
        if shutil.disk_usage(self._folder.parent).free < sum(x.nbytes for x in jax.tree.leaves(state)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._folder / str(step)))
        place = self._folder / str(step)
        if place.exists():
            if fault_of(place) is None:
                return False  # this very step is complete already
            self._set_aside(place)
        place.mkdir(parents=True)
        return True

    def wait(self) -> None:
        """Waits for the save under way, of all hosts; raises its error."""
        if self._commit_under_way is not None:
            under_way, self._commit_under_way = self._commit_under_way, None
            under_way.result()
            hosts.from_first(lambda: None)  # the manifest is process 0's

    def make_folder(self) -> None:
        """Makes the folder of all checkpoints, so that one that cannot be made is refused before the first step.

        Raises:
            InputError: a file has its name.
        """
        try:
            self._folder.mkdir(exist_ok=True)
        except FileExistsError:
            raise InputError(f"{self._folder} is a file, expected a folder; move it away") from None

    def check(self) -> None:
        """Raises the error of the save under way, where it has failed already."""
        under_way = self._commit_under_way
        if under_way is not None and under_way.done() and under_way.exception() is not None:
            self.wait()

    def improves(self, row: dict) -> bool:
        """Whether a row of metrics has a better number than all complete checkpoints, of the kind whose best stays."""
        value = self._keep.value({"metrics": row})
        if value is None:
            return False
        self.wait()
        best = [self._keep.value(facts) for facts in hosts.from_first(lambda: list(self._complete().values()))]
        return all(self._keep.better(value, one) for one in best if one is not None)

    def best(self) -> int | None:
        """The complete step with the best number of the kind whose best stays."""
        return hosts.from_first(lambda: self._keep.best_step(self._complete()))

    def latest(self) -> int | None:
        """The newest complete step, or None. Says which newer folders it skips, and why."""
        return next(iter(self.newest(1)), None)

    def newest(self, count: int) -> tuple[int, ...]:
        """The newest complete steps, the newest first, at most `count`. Says which folders it skips, and why."""
        return tuple(hosts.from_first(lambda: self._newest(count)))

    def complete(self, step: int) -> bool:
        """Whether a step is there and complete; says why not."""
        return hosts.from_first(lambda: self._is_complete(step, self._folder / str(step)))

    def _is_complete(self, step: int, place: pathlib.Path) -> bool:
        fault = fault_of(place) if place.is_dir() else "there is no such folder"
        if fault is not None:
            self._faulty.add(step)
            self._say(f"checkpoint {place.name} is skipped: {fault}")
        return fault is None

    def _newest(self, count: int) -> list[int]:
        found: list[int] = []
        for place in sorted(self._folder.glob("*.orbax-checkpoint-tmp*")):
            self._say(f"checkpoint {place.name} is skipped: it was cut off while it was written")
        for step, place in reversed(self._steps()):
            if len(found) == count:
                break
            if self._is_complete(step, place):
                found.append(step)
        return found

    def facts(self, step: int) -> dict:
        """The facts that were saved with a step."""
        return hosts.from_first(lambda: read_manifest(self._folder / str(step))["facts"])

    def restore(self, step: int, target: Any) -> Any:
        """The state of a step, placed and cast as `target` (shapes, dtypes, shardings) says.

        Raises:
            InputError: the saved arrays do not have the names and shapes of the target.
        """
        self._check_fit(step, target, whole=True)
        try:
            return self._orbax.restore(self._folder / str(step) / "state", args=ocp.args.StandardRestore(target))
        except ValueError as error:
            text = " ".join(str(error).split())[:300]
            raise InputError(f"checkpoint {self._folder / str(step)} does not fit this model: {text}") from None

    def restore_part(self, step: int, target: dict[str, Any]) -> Any:
        """A part of the state of a step, `{"params": ...}` or less of it; the rest is not read.

        Raises:
            InputError: the saved arrays lack some of the target's, or do not have their shapes.
        """
        self._check_fit(step, target, whole=False)
        found = {}
        for few in _at_once(flax.traverse_util.flatten_dict(target)):
            part = flax.traverse_util.unflatten_dict(few)
            part = self._restore(step, part, ocp.checkpoint_utils.construct_restore_args(part))
            found |= flax.traverse_util.flatten_dict(part)
        return flax.traverse_util.unflatten_dict(found)

    def restore_array(self, step: int, path: str, target: jax.ShapeDtypeStruct) -> np.ndarray:
        """One array of the state of a step, "params/embed/table", on the host.

        Raises:
            InputError: the saved array does not have the shape of the target.
        """
        one = flax.traverse_util.unflatten_dict({path: target}, sep="/")
        (x,) = jax.tree.leaves(self._restore(step, one, jax.tree.map(lambda _: ocp.RestoreArgs(np.ndarray), one)))
        if x.shape != target.shape:
            place = self._folder / str(step)
            raise InputError(f"checkpoint {place} does not fit this model: {path} has {x.shape}, not {target.shape}")
        return x

    def _restore(self, step: int, target: Any, places: Any) -> Any:
        args = ocp.args.PyTreeRestore(item=target, restore_args=places, partial_restore=True)
        try:
            handler = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
            return handler.restore(self._folder / str(step) / "state", args=args)
        except (ValueError, KeyError) as error:
            text = " ".join(str(error).split())[:300]
            raise InputError(f"checkpoint {self._folder / str(step)} does not fit this model: {text}") from None

    def _check_fit(self, step: int, target: Any, whole: bool) -> None:
        """Raises InputError where the arrays in the manifest are not the target's; says once that some are cast."""

        def look() -> str | None:
            saved = read_manifest(self._folder / str(step)).get("arrays")  # older versions did not list them
            if saved is None:
                return None
            wanted = _arrays(target)
            cast = [name for name in wanted if name in saved and saved[name][1] != wanted[name][1]]
            if cast and not self._told_of_casts:
                self._told_of_casts = True
                old, new = saved[cast[0]][1], wanted[cast[0]][1]
                self._say(f"checkpoint {step} is cast: {_few(cast)} from {old} to {new}")
            return misfit(saved, wanted, whole)

        fault = hosts.from_first(look)
        if fault is not None:
            raise InputError(
                f"checkpoint {self._folder / str(step)} does not fit this model: {fault}; give the config that it was "
                "saved with (config.json of its run), or begin a new folder"
            )

    def _steps(self) -> list[tuple[int, pathlib.Path]]:
        for trash in self._folder.glob(f"{_TRASH}*"):
            shutil.rmtree(trash, ignore_errors=True)
        return steps_in(self._folder)

    def _complete(self) -> dict[int, dict]:
        """The facts of the steps that have a manifest, without those that were found faulty."""
        there = [(s, p) for s, p in self._steps() if (p / MANIFEST).is_file() and s not in self._faulty]
        return {step: read_manifest(place)["facts"] for step, place in there}

    def _set_aside(self, place: pathlib.Path) -> None:
        n = 1
        while (aside := place.with_name(f"{place.name}.incomplete-{n}")).exists():
            n += 1
        place.rename(aside)
        self._say(f"checkpoint {place.name} was incomplete and now stands as {aside.name}")

    def _commit(self, step: int, arrays: dict, facts: dict) -> None:
        """Waits for orbax to put all files of a save in place, then writes the manifest and drops old checkpoints."""
        self._orbax.wait_until_finished()
        if not hosts.first():
            return
        place = self._folder / str(step)
        manifest = {"step": step, "facts": facts, "arrays": arrays, "files": _files(place)}
        partial = place / f"{MANIFEST}.partial"
        partial.write_text(json.dumps(manifest) + "\n", encoding="utf-8")
        partial.replace(place / MANIFEST)
        self._faulty.discard(step)
        complete = self._complete()
        for old in sorted(set(complete) - self._keep.stay(complete)):
            # Renamed first: a kill in the middle leaves nothing that looks like a checkpoint.
            trash = self._folder / f"{_TRASH}{old}"
            (self._folder / str(old)).rename(trash)
            shutil.rmtree(trash, ignore_errors=True)


def steps_in(folder: pathlib.Path) -> list[tuple[int, pathlib.Path]]:
    """The folders that are named by a step, complete or not, ascending."""
    if not folder.is_dir():
        return []
    return sorted((int(p.name), p) for p in folder.iterdir() if p.is_dir() and p.name.isdigit())


def read_manifest(place: pathlib.Path) -> dict[str, Any]:
    """The manifest of a complete checkpoint."""
    return json.loads((place / MANIFEST).read_text(encoding="utf-8"))


def _arrays(state: Any) -> dict[str, list]:
    """Shape, dtype and place on the mesh of every array by its path, for `--inspect`."""

    def described(x) -> list:
        spec = getattr(getattr(x, "sharding", None), "spec", ())
        return [list(x.shape), str(getattr(x, "dtype", "float32")), [axes and str(axes) for axes in spec]]

    named = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): described(x) for path, x in named}


def misfit(saved: dict[str, list], wanted: dict[str, list], whole: bool) -> str | None:
    """In what the arrays of a checkpoint are not those that are wanted, by their paths; None where they are.

    Args:
        saved, wanted: as in a manifest, [shape, dtype, place] by path.
        whole: what is saved and not wanted counts too.
    """

    def size(shape: list[int]) -> str:
        return "x".join(map(str, shape)) or "a number"

    other = [
        f"{name} (saved {size(saved[name][0])}, wanted {size(x[0])})"
        for name, x in wanted.items()
        if name in saved and saved[name][0] != x[0]
    ]
    found = {
        "it lacks": [name for name in wanted if name not in saved],
        "it has beside": [name for name in saved if name not in wanted] if whole else [],
        "of another shape is": other,
    }
    return "; ".join(f"{what} {_few(names)}" for what, names in found.items() if names) or None


def _few(names: list[str], most: int = 3) -> str:
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def _at_once(arrays: dict[tuple, Any]) -> Iterator[dict[tuple, Any]]:
    """The arrays in groups that may be read at the same time: reading one takes its memory twice."""
    few: dict[tuple, Any] = {}
    for path, x in arrays.items():
        if few and sum(one.size for one in few.values()) + x.size > _AT_ONCE // 4:
            yield few
            few = {}
        few[path] = x
    yield few


def _files(place: pathlib.Path) -> dict[str, list[int]]:
    """Size and CRC-32 of every file of a checkpoint but its manifest."""
    found = {}
    for path in sorted(p for p in place.rglob("*") if p.is_file() and not p.name.startswith(MANIFEST)):
        crc = 0
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                crc = zlib.crc32(block, crc)
        found[path.relative_to(place).as_posix()] = [path.stat().st_size, crc]
    return found


def fault_of(place: pathlib.Path) -> str | None:
    """Why a checkpoint is not complete, or None if it is."""
    path = place / MANIFEST
    if not path.is_file():
        return f"it has no {MANIFEST}, so it was cut off while it was written"
    try:
        manifest = read_manifest(place)
        listed = [(str(name), int(size), int(crc)) for name, (size, crc) in manifest["files"].items()]
        manifest["facts"]["fingerprints"].items()
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"its {MANIFEST} is damaged"
    present = _files(place)
    for name, size, crc in listed:
        if name not in present:
            return f"its file {name} is missing"
        if present[name][0] != size:
            return f"its file {name} has {present[name][0]} bytes instead of {size}"
        if present[name][1] != crc:
            return f"the checksum of its file {name} is wrong"
    return None
