"""A preparation under way: its plan, and the files that its phases hand to each other.

Everything stands in `data.partial`, so that a phase may run in any process on any machine that sees the folder, and a
preparation that was stopped goes on with the units that are not done. For unit 7 there are

    00007.documents.jsonl   cleaned documents, one a line
    00007.table.npz         what deciding needs of each: offset in that file, length, hashes, whether it is held out
    00007.bands.npy         MinHash bands, memory-mapped by deciding; *.line.npy and *.paragraph.npy alike
    00007.removed.jsonl     documents that a stage dropped, with the reason
    00007.skipped.jsonl     records that could not be read
    00007.documents.json    accounts of the stages; written last: the unit is done
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterator
from typing import IO, Any

import numpy as np

from llm.data.documents import Document, Tally
from llm.data.sources import Unit
from llm.data.spec import CleanSpec, DataSpec, DedupSpec, ObjectiveSpec
from llm.tokenization import TokenizerSpec

PLAN = "plan.json"


@dataclasses.dataclass(frozen=True)
class Preparation:
    """The settings that decide what is prepared: one spec a room."""

    data: DataSpec = DataSpec()
    clean: CleanSpec = CleanSpec()
    dedup: DedupSpec = DedupSpec()
    tokenizer: TokenizerSpec = TokenizerSpec()
    objective: ObjectiveSpec = ObjectiveSpec()

    def to_json(self) -> dict:
        """The settings as JSON values; `objective` is left out: it is drawn when batches are made."""
        values = dataclasses.asdict(self)
        del values["objective"]
        return json.loads(json.dumps(values))


@dataclasses.dataclass(frozen=True, eq=False)
class Work:
    """An open plan: settings, and the units with the source that each belongs to."""

    folder: pathlib.Path
    spec: Preparation
    units: tuple[Unit, ...]
    evaluation: tuple[bool, ...]
    limits: tuple[int | None, ...]

    @classmethod
    def open(cls, folder: pathlib.Path) -> "Work":
        """Reads the plan in `data.partial`."""
        return _open(folder, (folder / PLAN).stat().st_mtime_ns)

    def path(self, unit: int | str, name: str) -> pathlib.Path:
        """The place of a unit's file, or of one of the whole preparation's."""
        return self.folder / (f"{unit:05d}.{name}" if isinstance(unit, int) else f"{unit}.{name}")

    def done(self, unit: int | str, phase: str) -> bool:
        """Whether a phase has been done for a unit."""
        return self.path(unit, f"{phase}.json").is_file()

    def finish(self, unit: int | str, phase: str, account: dict) -> None:
        """Marks a phase as done for a unit, with its account."""
        write_json(self.path(unit, f"{phase}.json"), account)

    def account(self, unit: int | str, phase: str) -> dict:
        """What `finish` wrote."""
        return json.loads(self.path(unit, f"{phase}.json").read_text(encoding="utf-8"))

    def documents(self, unit: int) -> Iterator[Document]:
        """The cleaned documents of a unit."""
        with self.path(unit, "documents.jsonl").open("rb") as file:
            for line in file:
                yield decode_document(line)

    def shards(self, side: str) -> list[pathlib.Path]:
        """The token shards of a split, in the order of units; a unit without such documents has none."""
        paths = (self.path(unit, f"{side}.tokens") for unit in range(len(self.units)))
        return [path for path in paths if path.is_file()]

    def table(self, unit: int) -> dict[str, np.ndarray]:
        """The arrays of a unit's documents."""
        with np.load(self.path(unit, "table.npz")) as arrays:
            return dict(arrays)


_ROOMS = {"data": DataSpec, "clean": CleanSpec, "dedup": DedupSpec, "tokenizer": TokenizerSpec}


@functools.lru_cache(maxsize=2)
def _open(folder: pathlib.Path, written: int) -> Work:
    plan = json.loads((folder / PLAN).read_text(encoding="utf-8"))
    rooms: dict[str, Any] = {name: kind(**_tuples(plan["settings"][name])) for name, kind in _ROOMS.items()}
    units = plan["units"]
    return Work(
        folder,
        Preparation(**rooms),
        tuple(Unit(**entry["unit"]) for entry in units),
        tuple(entry["evaluation"] for entry in units),
        tuple(entry["limit"] for entry in units),
    )


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def encode_document(document: Document) -> bytes:
    """A document as one line of JSON."""
    record = {"id": document.id, "text": document.text, "meta": document.meta}
    return json.dumps(record, ensure_ascii=False).encode("utf-8") + b"\n"


def decode_document(line: bytes) -> Document:
    """The document of one line."""
    return Document(**json.loads(line))


def write_json(path: pathlib.Path, value) -> None:
    """Writes JSON, whole or not at all."""
    with whole(path) as file:
        file.write(json.dumps(value, indent=1, ensure_ascii=False).encode("utf-8") + b"\n")


@contextlib.contextmanager
def whole(path: pathlib.Path) -> Iterator[IO[bytes]]:
    """A file to write that appears under its name whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        yield file
    partial.replace(path)


def tallies_to_json(tallies: list[Tally]) -> list[dict]:
    """Accounts as JSON values."""
    return [dataclasses.asdict(tally) for tally in tallies]


def merge_tallies(accounts: list[list[dict]]) -> list[Tally]:
    """The accounts of all units, added stage by stage in the order of units."""
    merged: dict[str, Tally] = {}
    for account in accounts:
        for values in account:
            tally = Tally(**values)
            if tally.stage in merged:
                merged[tally.stage].add(tally)
            else:
                merged[tally.stage] = tally
    return list(merged.values())
