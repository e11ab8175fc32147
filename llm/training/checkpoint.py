"""Checkpoints: written by orbax in the background, complete only once their manifest stands.

`checkpoints/<step>/` holds `state/`, orbax's arrays, and `manifest.json`, which is written last and lists every file
with its size and checksum. A folder without a manifest, or one whose files do not match it, was cut off while it was
written: a restart names it, leaves it and takes the newest complete one.
"""

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

MANIFEST = "manifest.json"
_TRASH = ".removed-"
# Arrays up to this size together are read at the same time, larger ones each by itself.
_AT_ONCE = 2**26


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


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: the run's `checkpoints/`.
        keep: newest complete checkpoints that stay.
        say: told of every folder that is skipped.
    """

    def __init__(self, folder: pathlib.Path, keep: int, say: Callable[[str], None] = print):
        self._folder = folder.absolute()
        self._keep = keep
        self._say = say
        self._faulty: set[int] = set()
        self._writer = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._commit_under_way: concurrent.futures.Future | None = None
        # A failed save is raised by `wait`; its copies in the logs of orbax's threads would only bury that line.
        for name in ("absl", "asyncio"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self._orbax = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())

    def save(self, step: int, state: Any, **facts) -> None:
        """Starts writing the state of a step; `facts` (JSON values) go into its manifest.

        Raises:
            OSError: the disk has no room for it.
            OSError, ValueError: an earlier save failed; it is raised by the next `save` or `wait`.
        """
        place = self._make_place(step, state)
        if place is not None:
            self._orbax.save(place / "state", args=ocp.args.StandardSave(state))
            self._commit_under_way = self._writer.submit(self._commit, step, facts)

    def save_one_by_one(self, step: int, state: Any, **facts) -> None:
        """Writes a state whose leaves are `Later`, in the memory of the largest of them; ends when it is written.

        Raises:
            OSError: the disk has no room for it.
            Exception: what the making of an array raises; the checkpoint is then incomplete.
        """
        place = self._make_place(step, state)
        if place is not None:
            kinds = ocp.type_handlers.create_type_handler_registry((Later, _OneByOne()))
            handler = ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=kinds))
            handler.save(place / "state", args=ocp.args.PyTreeSave(state))
            self._commit(step, facts)

    def _make_place(self, step: int, state: Any) -> pathlib.Path | None:
        """The new folder of a step; None where a complete one stands already."""
        self.wait()
        # Looked at before, because a disk that fills up under orbax's threads makes each of them print a traceback.
        if shutil.disk_usage(self._folder.parent).free < sum(x.nbytes for x in jax.tree.leaves(state)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._folder / str(step)))
        place = self._folder / str(step)
        if place.exists():
            if _fault(place) is None:
                return None  # this very step is complete already
            self._set_aside(place)
        place.mkdir(parents=True)
        return place

    def wait(self) -> None:
        """Waits for the save under way; raises its error."""
        if self._commit_under_way is not None:
            under_way, self._commit_under_way = self._commit_under_way, None
            under_way.result()

    def latest(self) -> int | None:
        """The newest complete step, or None. Says which newer folders it skips, and why."""
        return next(iter(self.newest(1)), None)

    def newest(self, count: int) -> tuple[int, ...]:
        """The newest complete steps, the newest first, at most `count`. Says which folders it skips, and why."""
        found: list[int] = []
        for place in sorted(self._folder.glob("*.orbax-checkpoint-tmp*")):
            self._say(f"checkpoint {place.name} is skipped: it was cut off while it was written")
        for step, place in reversed(self._steps()):
            if len(found) == count:
                break
            fault = _fault(place)
            if fault is None:
                found.append(step)
                continue
            self._faulty.add(step)
            self._say(f"checkpoint {place.name} is skipped: {fault}")
        return tuple(found)

    def facts(self, step: int) -> dict:
        """The facts that were saved with a step."""
        return json.loads((self._folder / str(step) / MANIFEST).read_text(encoding="utf-8"))["facts"]

    def restore(self, step: int, target: Any) -> Any:
        """The state of a step, placed as `target` (shapes, dtypes, shardings) says.

        Raises:
            InputError: the saved arrays do not have the shapes of the target.
        """
        try:
            return self._orbax.restore(self._folder / str(step) / "state", args=ocp.args.StandardRestore(target))
        except ValueError as error:
            text = " ".join(str(error).split())[:300]
            raise InputError(f"checkpoint {self._folder / str(step)} does not fit this model: {text}") from None

    def restore_part(self, step: int, target: dict[str, Any]) -> Any:
        """A part of the state of a step, `{"params": ...}` or less of it; the rest is not read.

        Raises:
            InputError: the saved arrays do not have the shapes of the target.
        """
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

    def _steps(self) -> list[tuple[int, pathlib.Path]]:
        if not self._folder.is_dir():
            return []
        for trash in self._folder.glob(f"{_TRASH}*"):
            shutil.rmtree(trash, ignore_errors=True)
        return sorted((int(p.name), p) for p in self._folder.iterdir() if p.is_dir() and p.name.isdigit())

    def _set_aside(self, place: pathlib.Path) -> None:
        n = 1
        while (aside := place.with_name(f"{place.name}.incomplete-{n}")).exists():
            n += 1
        place.rename(aside)
        self._say(f"checkpoint {place.name} was incomplete and now stands as {aside.name}")

    def _commit(self, step: int, facts: dict) -> None:
        """Waits for orbax to put all files of a save in place, then writes the manifest and drops old checkpoints."""
        self._orbax.wait_until_finished()
        place = self._folder / str(step)
        manifest = {"step": step, "facts": facts, "files": _files(place)}
        partial = place / f"{MANIFEST}.partial"
        partial.write_text(json.dumps(manifest) + "\n", encoding="utf-8")
        partial.replace(place / MANIFEST)
        self._faulty.discard(step)
        complete = [p for s, p in self._steps() if (p / MANIFEST).is_file() and s not in self._faulty]
        for old in complete[: -self._keep]:
            # Renamed first: a kill in the middle leaves nothing that looks like a checkpoint.
            trash = old.with_name(f"{_TRASH}{old.name}")
            old.rename(trash)
            shutil.rmtree(trash, ignore_errors=True)


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


def _fault(place: pathlib.Path) -> str | None:
    """Why a checkpoint is not complete, or None if it is."""
    path = place / MANIFEST
    if not path.is_file():
        return f"it has no {MANIFEST}, so it was cut off while it was written"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
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
