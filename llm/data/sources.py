"""Sources of documents, and the units of work that they are read by.

A source is a packaged corpus by name ("austen", "r8/train"), a file, a folder (with those below it), a glob
("texts/**/*.jsonl"), an http(s) address of a file, or "hf:<dataset>[:<config>[:<split>]]". In folders and globs hidden
files and those that no reader has are passed over, and links to folders are followed, but never in a circle.

Documents without an id of their own are named by the path inside the source, and by line, row or place in the list.
"""

import dataclasses
import fnmatch
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterator

from llm.data import cache, packaged, readers
from llm.data.documents import Document
from llm.data.spec import DataSpec
from llm.errors import InputError

SMALL_BYTES = 4 << 20  # a file up to that size is stamped by its content
_BLOCK = 1 << 20

OnBad = Callable[[str, str, str], None]


@dataclasses.dataclass(frozen=True)
class Unit:
    """A piece of work: some whole files of a source, or a part of one. `Unit(**json)` gives back what JSON was made of.

    Attributes:
        kind: "files"; "lines", bytes `start` to `end` of a file, cut between lines; "row_groups" `start` to `end` of a
            parquet file; "rows" of a Hugging Face dataset.
        paths: names inside the source, sorted.
        size: bytes to read, for progress bars.
        line: the number of the first line or row.
    """

    source: str
    kind: str
    paths: tuple[str, ...]
    size: int
    start: int = 0
    end: int | None = None
    line: int = 1

    def __post_init__(self):
        object.__setattr__(self, "paths", tuple(self.paths))


def packaged_corpora() -> list[str]:
    """Names of the packaged corpora, the embedded one and those that are fetched."""
    return packaged.names()


def units(spec: DataSpec, source: str) -> list[Unit]:
    """The units of a source, sorted by path: they depend on the files and on nothing else.

    Small files share a unit; large files of lines, and parquet files, are cut into several; others are not.

    Raises:
        InputError: no such source, nothing in it that a reader has, or settings that its files cannot meet.
    """
    for name in (*spec.fields, spec.label):
        if name == "source":
            raise InputError(
                "data.fields and data.label cannot name 'source', where it is kept what a document is from"
            )
    if source.startswith("hf:"):
        return _hugging_face_units(source)
    root, names = _resolve(source)
    made: list[Unit] = []
    group: list[str] = []
    held = 0
    for name in names:
        found = readers.format_of(name)
        assert found is not None, name
        kind, packed = found
        if kind in readers.TEXTS and (spec.label or len(spec.fields) > 1 or spec.form != "text"):
            raise InputError(
                f"{_where(source, root, name)}: a .{kind} file has no fields but its text, and data.fields="
                f"{spec.fields} data.label={spec.label!r} data.form={spec.form!r} ask for more; take .jsonl, .csv or "
                ".parquet"
            )
        size = _size(root / name)
        divisible = not packed and (kind in ("jsonl", "parquet") or (kind == "txt" and spec.txt == "line"))
        whole = size <= spec.unit_bytes or not divisible
        if group and (not whole or held + size > spec.unit_bytes):
            made.append(Unit(source, "files", tuple(group), held))
            group, held = [], 0
        if whole:
            group.append(name)
            held += size
        elif kind == "parquet":
            made += _row_groups(source, root, name, size, spec.unit_bytes)
        else:
            cuts = [*_cuts(root / name, size, spec.unit_bytes), (size, 0)]
            for (start, line), (end, _) in zip(cuts, cuts[1:]):
                made.append(Unit(source, "lines", (name,), end - start, start, end, line))
    if group:
        made.append(Unit(source, "files", tuple(group), held))
    return made


def read(unit: Unit, spec: DataSpec, on_bad: OnBad = lambda *_: None) -> Iterator[Document]:
    """The documents of a unit, in order, one at a time, with the prefix of their source.

    With `spec.on_error="skip"`, `on_bad(where, reason, record)` hears of each record that cannot be read ("" for a file
    of which the rest, or all, cannot). Ids that stand twice in one file are such; twice in a source they are not looked
    for here.

    Raises:
        InputError: something cannot be read and `spec.on_error` is "stop": file, line and reason.
    """
    prefix = dict(zip((spec.train, *spec.more), spec.prefixes)).get(unit.source, "")
    for document in _documents(unit, spec, on_bad):
        yield _prefixed(document, spec.fields[0], prefix) if prefix else document


def _prefixed(document: Document, field: str, prefix: str) -> Document:
    """The document with a prefix before a field of it; what is blank stays so, and is dropped later."""
    before = document.text if field == "text" else document.meta[field]
    if not before.strip():
        return document
    if field == "text":
        return dataclasses.replace(document, text=prefix + before)
    return dataclasses.replace(document, meta=document.meta | {field: prefix + before})


def _documents(unit: Unit, spec: DataSpec, on_bad: OnBad) -> Iterator[Document]:
    if unit.kind == "rows":
        yield from _hugging_face_rows(unit, spec, on_bad)
        return
    root = _root(unit.source)
    corpus = unit.source if unit.source in packaged.names() else ""
    for path in unit.paths:
        where = _where(unit.source, root, path)
        name = path.removesuffix(".xz") if corpus == packaged.EMBEDDED else path
        own = bool(corpus) and corpus != packaged.EMBEDDED
        file = readers.File(root / path, name, where, unit.start, unit.end, unit.line, own_source=own)
        # The names in a packaged corpus are its own, whatever the spec calls them in other sources.
        named = dataclasses.replace(spec, text="text", id="id") if own else spec
        yield from readers.read_file(file, named, _judge(where, spec, on_bad))


def read_all(spec: DataSpec, source: str) -> list[Document]:
    """All documents of a source that have a text. `spec.max_documents` and `spec.on_error` are not looked at.

    Raises:
        InputError: as `units` and `read` do with on_error="stop"; or no document has a text.
    """
    spec = dataclasses.replace(spec, on_error="stop")
    found = [d for unit in units(spec, source) for d in read(unit, spec) if d.text.strip()]
    if not found:
        raise InputError(f"{source}: the corpus is empty, there is no text in it")
    return found


def stamp(source: str) -> str | None:
    """A mark that changes when a source does; None when it is no longer there.

    Of files: names, and contents up to 4 MB, for larger ones size and time of change, so that an edit that keeps the
    size is noticed, and a copied corpus of small files is the same. Of an address: the file that was downloaded from
    it. Of packaged corpora: package, version and hash. Of a Hugging Face dataset: its fingerprint.
    """
    try:
        if source.startswith("hf:"):
            return _hugging_face(source)._fingerprint
        if source in packaged.names() and source != packaged.EMBEDDED:
            return packaged.stamp(source)
        path = pathlib.Path(source)
        if os.path.isfile(path):
            root, names = path.parent, [path.name]  # any file, also one that no reader has: a word list, a tokenizer
        else:
            root, names = _resolve(source)
    except InputError:
        return None
    digest = hashlib.sha256()
    for name in names:
        digest.update(f"{name}\0{_file_stamp(root / name)}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]


def _file_stamp(path: pathlib.Path) -> str:
    try:
        about = path.stat()
        if about.st_size > SMALL_BYTES:
            return f"{about.st_size} {about.st_mtime_ns}"
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        return str(error.strerror)


def _judge(where: str, spec: DataSpec, on_bad: OnBad) -> readers.Bad:
    def bad(line: int | None, reason: str, record: str) -> None:
        place = where if line is None else f"{where}:{line}"
        if spec.on_error == "stop":
            raise InputError(f"{place}: {reason}")
        on_bad(place, reason, record)

    return bad


# --- files ------------------------------------------------------------------------------------------------------------


def _resolve(source: str) -> tuple[pathlib.Path, list[str]]:
    """The folder that names are relative to, and the sorted names of the files.

    Raises:
        InputError: there is no such source, or no file in it that a reader has.
    """
    root = _root(source)
    path = pathlib.Path(source)
    if source == packaged.EMBEDDED:
        return root, sorted(entry.name for entry in root.iterdir() if entry.name.endswith(".txt.xz"))
    if source in packaged.names():
        return root, sorted(file.name for file in packaged.files(source))
    if _is_address(source):
        return root, [cache.download(source).name]
    if os.path.isdir(path):
        found = list(_walk(root))
    elif os.path.isfile(path):
        if readers.format_of(path.name) is None:
            raise InputError(f"{source}: no reader has such a file; there are {_formats()}")
        return root, [path.name]
    elif _is_glob(source):
        pattern = _expression(path.relative_to(root).parts)
        found = [name for name in _walk(root) if pattern.fullmatch(name)]
        if not found:
            raise InputError(f"{source}: the corpus is empty, no file has such a name")
    else:
        raise InputError(
            f"there is no corpus {source!r}: no path, no packaged corpus ({', '.join(packaged_corpora())})"
        )
    known = sorted(name for name in found if readers.format_of(name))
    if not known:
        others = sorted({pathlib.PurePosixPath(name).suffix or name for name in found})[:5]
        raise InputError(
            f"{source}: the corpus is empty, it holds no {_formats()} file"
            + (f" (but {', '.join(others)})" if others else "")
        )
    return root, known


def _root(source: str) -> pathlib.Path:
    """The folder that the names in units are relative to."""
    if source == packaged.EMBEDDED:
        return packaged.novels()
    if source in packaged.names():
        return packaged.files(source)[0].parent
    if _is_address(source):
        if readers.format_of(cache.name_of(source)) is None:
            raise InputError(f"{source}: the address must end in the name of a file that a reader has: {_formats()}")
        return cache.download(source).parent
    path = pathlib.Path(source)
    if os.path.isdir(path):
        return path
    if os.path.isfile(path) or not _is_glob(source):
        return path.parent
    parts = path.parts
    fixed = next(n for n, part in enumerate(parts) if _is_glob(part))
    return pathlib.Path(*parts[:fixed])


def _is_address(source: str) -> bool:
    return source.lower().startswith(("http://", "https://"))


def _is_glob(text: str) -> bool:
    return any(character in text for character in "*?[")


def _expression(parts: tuple[str, ...]) -> re.Pattern:
    """What a glob below its fixed folders matches; ** stands for any number of folders, none as well."""
    made = ["(?:[^/]+/)*" if part == "**" else fnmatch.translate(part).removesuffix(r"\Z").replace(".*", "[^/]*")
            for part in parts]  # fmt: skip
    if parts[-1] == "**":
        made.append("[^/]+")
    joined = "".join(part if part == "(?:[^/]+/)*" else part + "/" for part in made)
    return re.compile(joined.removesuffix("/"))


def _walk(root: pathlib.Path) -> Iterator[str]:
    """Names below a folder, without hidden ones; a link to a folder that one is already in is not followed."""

    def inside(folder: pathlib.Path, prefix: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
        about = folder.stat()
        here = (about.st_dev, about.st_ino)
        if here in above:
            return
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise InputError(f"{folder}: cannot be read: {error.strerror}") from None
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if os.path.isdir(entry.path):  # entry.is_dir() raises for a link to itself
                yield from inside(folder / entry.name, f"{prefix}{entry.name}/", (*above, here))
            elif entry.is_symlink() or entry.is_file():  # a link to nothing is told of when it is read
                yield prefix + entry.name

    return inside(root, "", ())


def _where(source: str, root: pathlib.Path, name: str) -> str:
    """How messages and meta["source"] name a file: never by its place in the cache."""
    if source == packaged.EMBEDDED:
        return f"{source}/{name.removesuffix('.xz')}"
    if source in packaged.names():
        return f"{source.partition('/')[0]}/{name}"
    return source if _is_address(source) else str(root / name)


def _size(path: pathlib.Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # told of when it is read
        return 0


def _formats() -> str:
    return ", ".join(readers.FORMATS) + " (texts also as " + ", ".join(readers.COMPRESSED) + ")"


def _cuts(path: pathlib.Path, size: int, unit_bytes: int) -> Iterator[tuple[int, int]]:
    """Where the parts of a file begin, at starts of lines about `unit_bytes` apart: offset and number of the line."""
    yield 0, 1
    offset, line, target = 0, 1, unit_bytes
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            while block.endswith(b"\r") and (more := file.read(1)):  # \r\n stays in one block
                block += more
            counted = 0
            while offset + len(block) >= target:
                found = re.compile(rb"\r\n|\n|\r").search(block, max(counted, target - offset - 1))
                if not found or offset + found.end() >= size:
                    break
                line += _ends(block[counted : found.end()])
                counted = found.end()
                yield offset + counted, line
                target = offset + counted + unit_bytes
            line += _ends(block[counted:])
            offset += len(block)


def _ends(block: bytes) -> int:
    returns = block.count(b"\r")
    return block.count(b"\n") + (returns - block.count(b"\r\n") if returns else 0)


def _row_groups(source: str, root: pathlib.Path, name: str, size: int, unit_bytes: int) -> list[Unit]:
    """Row groups, as many in a unit as make `unit_bytes` together."""
    import pyarrow
    import pyarrow.parquet

    try:
        about = pyarrow.parquet.read_metadata(root / name)
    except (pyarrow.ArrowException, OSError):  # told of when it is read
        return [Unit(source, "files", (name,), size)]
    made, start, first, row, held = [], 0, 1, 1, 0
    for number in range(about.num_row_groups):
        group = about.row_group(number)
        row += group.num_rows
        held += group.total_byte_size
        if held >= unit_bytes or number == about.num_row_groups - 1:
            made.append(Unit(source, "row_groups", (name,), held, start, number + 1, first))
            start, first, held = number + 1, row, 0
    return made


# --- Hugging Face datasets --------------------------------------------------------------------------------------------

_ROWS = 10_000


def _hugging_face(source: str):
    parts = source.removeprefix("hf:").split(":")
    if not parts[0] or len(parts) > 3:
        raise InputError(f"{source}: expected hf:<dataset>[:<config>[:<split>]]")
    name, config, split = [*parts, "", ""][:3]
    try:
        import datasets
    except ImportError:
        raise InputError(f"{source}: needs the package datasets; pip install datasets") from None
    try:
        found = datasets.load_dataset(name, config or None)
    except Exception as error:  # of the many kinds that it raises, all say what is wrong with the source
        raise InputError(f"{source}: {' '.join(str(error).split())[:300] or type(error).__name__}") from None
    split = split or ("train" if "train" in found else "")
    if split not in found:
        raise InputError(f"{source}: name one of its splits, {', '.join(map(str, found))}")
    return found[split]


def _hugging_face_units(source: str) -> list[Unit]:
    rows = _hugging_face(source).num_rows
    if not rows:
        raise InputError(f"{source}: the corpus is empty, the split has no rows")
    starts = range(0, rows, _ROWS)
    return [Unit(source, "rows", (), min(_ROWS, rows - n), n, min(n + _ROWS, rows), n + 1) for n in starts]


def _hugging_face_rows(unit: Unit, spec: DataSpec, on_bad: OnBad) -> Iterator[Document]:
    table = _hugging_face(unit.source)
    file = readers.File(pathlib.Path(), unit.source.removeprefix("hf:"), unit.source)
    records = readers.Records(file, spec, _judge(unit.source, spec, on_bad))
    assert unit.end is not None
    for row in range(unit.start, unit.end):
        yield from records.documents(json.loads(json.dumps(readers.json_value(table[row]))), row + 1)
