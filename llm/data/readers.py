"""Readers of the file formats that text comes in: bytes to documents, record by record, whatever the file's size.

    .txt            a document is the file, a line or a paragraph, as `data.txt` says
    .md .html .htm  a document is the file; an HTML document is marked by meta["format"] = "html"
    .jsonl          a document is a line, a JSON object
    .csv .tsv       a document is a row (RFC 4180 quoting in both), named by the header line
    .parquet        a document is a row
    .gz .bz2 .xz .zst behind any of them but .parquet

Lines end with LF, CR LF or CR, never with another character that Unicode counts as a line end. Text is UTF-8; its
byte-order mark is taken off. An id is the record's own, or "file:line" ("file:row" of parquet); that of a whole .txt
file is its path without the suffix.
"""

import collections
import contextlib
import csv
import dataclasses
import itertools
import json
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from llm.data.documents import Document
from llm.data.spec import DataSpec
from llm.data.streams import (
    BOM,
    BadRecord,
    File,
    Line,
    NotUTF8,
    Unreadable,
    decode,
    format_of,
    lines,
    raw,
    text_chunks,
)  # fmt: skip
from llm.errors import InputError

BATCH = 256  # rows of parquet read at a time

OnBad = Callable[[str, str, str], None]


def read_file(file: File, spec: DataSpec, on_bad: OnBad) -> Iterator[Document]:
    """The documents of a file, or of a part of one.

    `on_bad(where, reason, record)` hears of each record that cannot be read; the rest of the file is still read. With
    `spec.on_error` "stop" the first one is an InputError instead.
    """
    kind, _ = format_of(file.name) or ("", "")
    reader = {".jsonl": _jsonl, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet}.get(kind, _text)

    def bad(line: int | None, reason: str, record: str = "") -> None:
        where = file.shown if line is None else f"{file.shown}:{line}"
        report(spec, on_bad, where, reason, record)

    try:
        yield from reader(file, kind, spec, bad)
    except Unreadable as error:
        bad(error.line, str(error))


def report(spec: DataSpec, on_bad: OnBad, where: str, reason: str, record: str) -> None:
    """Tells of a record that cannot be read, as `spec.on_error` wants it.

    Raises:
        InputError: `spec.on_error` is "stop".
    """
    if spec.on_error == "stop":
        raise InputError(f"{where}: {reason}")
    on_bad(where, reason, record)


def to_document(record: dict[str, Any], name: str, where: str, spec: DataSpec) -> Document:
    """The document of a record; `name` is its id where it brings none, `where` its meta["source"].

    Raises:
        BadRecord: a field or the label is missing, or is of another type.
    """
    for field in spec.fields:
        key = spec.text if field == "text" else field
        if not isinstance(record.get(key), str):
            raise BadRecord(f'expected a text under "{key}", {_instead(record, key)}')
    if spec.label and (not isinstance(record.get(spec.label), str | int) or record[spec.label] == ""):
        raise BadRecord(f'expected a label, text or whole number, under "{spec.label}", {_instead(record, spec.label)}')
    own = record.get(spec.id) if spec.id else None
    if not isinstance(own, str | int | float | None):
        raise BadRecord(f'expected an id, text or number, under "{spec.id}", {_instead(record, spec.id)}')
    left_out = {spec.text, spec.id} - {field for field in spec.fields if field != "text"} - {spec.label}
    meta = {key: value for key, value in record.items() if key not in left_out}
    return Document(name if own is None or own == "" else str(own), record[spec.text], {**meta, "source": where})


def _instead(record: dict[str, Any], key: str) -> str:
    if key not in record:
        keys = ", ".join(f'"{key}"' for key in itertools.islice(record, 12)) + (", ..." if len(record) > 12 else "")
        return f"there are {keys}" if keys else "the record is empty"
    value = record[key]
    return "it is null" if value is None else "it is blank" if value == "" else f"it is of type {type(value).__name__}"


# --- formats ----------------------------------------------------------------------------------------------------------


def _text(file: File, kind: str, spec: DataSpec, bad: Callable[..., None]) -> Iterator[Document]:
    if spec.fields != ("text",) or spec.label:
        wanted = [field for field in (*spec.fields, spec.label) if field not in ("text", "")]
        raise Unreadable(f"a {kind} file has no field {wanted[0]!r}; records come from .jsonl, .csv, .tsv and .parquet")
    if kind == ".txt" and spec.txt != "file":
        yield from _parts(file, spec, bad)
        return
    data = b"".join(text_chunks(file))
    mark = len(BOM) if data.startswith(BOM) else 0
    try:
        text = decode(data[mark:], mark)
    except NotUTF8 as error:
        bad(len((data[: error.offset] + b"x").splitlines()), str(error))
        return
    meta = {"source": file.shown, **({"format": "html"} if kind in (".html", ".htm") else {})}
    yield Document(file.name[: -len(kind)] if file.name.lower().endswith(".txt") else file.name, text, meta)


def _parts(file: File, spec: DataSpec, bad: Callable[..., None]) -> Iterator[Document]:
    """Lines, or paragraphs; blank ones are none."""
    found: list[Line] = []
    for line in itertools.chain(lines(file), [Line(0, 0, b"")]):
        blank = not line.data.strip()
        if not blank:
            found.append(line)
        if found and (blank or spec.txt == "line"):
            data = b"".join(line.data for line in found)
            where = f"{file.shown}:{found[0].number}"
            try:
                text = decode(data, found[0].offset)
                yield Document(f"{file.name}:{found[0].number}", text.rstrip("\r\n"), {"source": where})
            except NotUTF8 as error:
                line = next(line for line in reversed(found) if line.offset <= error.offset)
                bad(line.number, str(error), raw(data))
            found = []


_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")
_SURROGATE = re.compile("[\ud800-\udfff]")


def _jsonl(file: File, kind: str, spec: DataSpec, bad: Callable[..., None]) -> Iterator[Document]:
    for line in lines(file):
        if not line.data.strip():
            continue
        try:
            record = _json(line)
            yield to_document(record, f"{file.name}:{line.number}", f"{file.shown}:{line.number}", spec)
        except BadRecord as error:
            bad(line.number, str(error), raw(line.data).rstrip("\r\n"))


def _json(line: Line) -> dict[str, Any]:
    text = decode(line.data, line.offset)
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"not JSON: {error}") from None
    if not isinstance(record, dict):
        raise BadRecord(f"expected a JSON object, it is of type {type(record).__name__}")
    if _SURROGATE_ESCAPE.search(line.data):
        for key, value in record.items():
            what = "the text" if key == "text" else f"the value of {key!a}"
            value = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            if lone := _SURROGATE.search(key) or _SURROGATE.search(value):
                code, place = f"U+{ord(lone[0]):04X}", lone.start()
                raise BadRecord(f"{what} has a lone surrogate {code} at character {place}; it is not valid Unicode")
    return record


@dataclasses.dataclass
class _Row:
    lines: list[Line]
    cells: list[str]
    error: str = ""


def _rows(source: Iterable[Line], delimiter: str) -> Iterator[_Row]:
    """Rows of csv, or the error of one. Behind an error reading goes on at the next line, not where csv stopped: a
    quote that is never closed would swallow the rest of the file.
    """
    waiting: collections.deque[Line] = collections.deque()
    stream, taken = iter(source), []

    def feed() -> Iterator[str]:
        while True:
            line = waiting.popleft() if waiting else next(stream, None)
            if line is None:
                return
            taken.append(line)
            # Kept as it is until the row is known: a byte that is not UTF-8 may stand inside quotes.
            yield line.data.decode("utf-8", "surrogateescape")

    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(feed(), delimiter=delimiter, strict=True)
    while True:
        taken.clear()
        try:
            row = _Row([], next(reader))
        except StopIteration:
            return
        except csv.Error as error:
            unclosed = "unexpected end of data" in str(error)
            row = _Row([], [], "a quoted field is never closed" if unclosed else str(error))
            waiting.extendleft(reversed(taken[1:]))
            del taken[1:]
            reader = csv.reader(feed(), delimiter=delimiter, strict=True)
        row.lines = list(taken)
        if row.cells or row.error:
            yield row


def _csv(file: File, kind: str, spec: DataSpec, bad: Callable[..., None]) -> Iterator[Document]:
    rows = _rows(lines(file), "\t" if kind == ".tsv" else ",")
    header = next(rows, None)
    if header is None:
        return
    try:
        names = _cells(header)
        if len(set(names)) != len(names):
            raise BadRecord(f"two columns of the header line have one name: {', '.join(names)}")
    except BadRecord as error:
        raise Unreadable(f"the header line is wrong: {error}") from None
    _check_columns(names, spec)
    for row in rows:
        number = row.lines[0].number
        try:
            cells = _cells(row)
            if len(cells) != len(names):
                raise BadRecord(f"{len(cells)} columns, the header line has {len(names)}")
            record = dict(zip(names, cells))
            yield to_document(record, f"{file.name}:{number}", f"{file.shown}:{number}", spec)
        except BadRecord as error:
            bad(number, str(error), raw(b"".join(line.data for line in row.lines)).rstrip("\r\n"))


def _cells(row: _Row) -> list[str]:
    for line in row.lines:
        decode(line.data, line.offset)
    if row.error:
        raise BadRecord(f"not csv: {row.error}")
    return row.cells


def _check_columns(names: list[str], spec: DataSpec) -> None:
    """Raises Unreadable when a column that every row needs is missing: one message, not one a row."""
    for name in (*spec.fields, spec.label):
        key = spec.text if name == "text" else name
        if key and key not in names:
            there = ", ".join(f'"{name}"' for name in names)
            raise Unreadable(
                f'expected a column "{key}", there are {there}; data.text, data.fields and data.label name columns'
            )


# --- parquet ----------------------------------------------------------------------------------------------------------


def open_parquet(path: pathlib.Path) -> Any:
    """A pyarrow ParquetFile.

    Raises:
        Unreadable: it cannot be opened, or is not parquet.
        InputError: pyarrow is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"{path}: .parquet files need pyarrow; pip install pyarrow") from None
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise Unreadable(f"cannot be read as parquet: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _parquet(file: File, kind: str, spec: DataSpec, bad: Callable[..., None]) -> Iterator[Document]:
    import pyarrow

    with contextlib.closing(open_parquet(file.path)) as table:
        try:
            _check_columns(table.schema_arrow.names, spec)
        except Unreadable:
            if file.start:
                return  # the part that begins the file tells of it
            raise
        row = file.line
        for group in range(file.start, table.num_row_groups if file.end is None else file.end):
            end = row + table.metadata.row_group(group).num_rows
            try:
                for batch in table.iter_batches(BATCH, row_groups=[group]):
                    for record in _records(batch):
                        yield from _row(record, row, file, spec, bad)
                        row += 1
            except (pyarrow.ArrowException, OSError) as error:
                bad(row, f"the rest of the row group cannot be read: {_first_line(error)}")
            row = end


def _records(batch: Any) -> Iterator[dict[str, Any] | BadRecord]:
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for n in range(batch.num_rows):
            try:
                yield batch.slice(n, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                yield BadRecord(f"not UTF-8: {error}")


def _row(record, row: int, file: File, spec: DataSpec, bad: Callable[..., None]) -> Iterator[Document]:
    try:
        if isinstance(record, BadRecord):
            raise record
        yield plain(to_document(record, f"{file.name}:{row}", f"{file.shown}:{row}", spec))
    except BadRecord as error:
        bad(row, str(error), "" if isinstance(record, BadRecord) else json.dumps(record, default=str))


def plain(document: Document) -> Document:
    """The document with JSON values in `meta`: dates, decimals, bytes and their like as Python writes them."""
    return dataclasses.replace(document, meta=json.loads(json.dumps(document.meta, default=str)))
