"""Files to documents: text, Markdown, HTML, JSON, JSON lines, csv, tsv and parquet; text formats compressed or not.

A line ends in LF, CR LF or a lone CR, nothing else (U+2028 is a character like others). Text is UTF-8; its byte-order
mark is taken off; UTF-16 and UTF-32, told by theirs, are refused. A reader calls `bad(line, reason, record)` for what
it cannot read and goes on behind it; `bad` may raise.
"""

import collections
import csv
import dataclasses
import json
import pathlib
import re
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any

from llm.data import messages
from llm.data.documents import Document
from llm.data.spec import DataSpec

FORMATS = {
    ".txt": "txt", ".md": "md", ".markdown": "md", ".html": "html", ".htm": "html", ".jsonl": "jsonl",
    ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet",
}  # fmt: skip
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
TEXTS = ("txt", "md", "html")  # formats without records: nothing but a text

Bad = Callable[[int | None, str, str], None]

_BLOCK = 1 << 20
_IDS = 1_000_000  # ids of one file that are remembered, so that memory has an end; doubles beyond them are not seen
_KEPT = 100_000  # characters of a bad record that are kept
_FIELD = 1 << 28  # characters of a csv field: a forgotten quote must not take the memory
_TRUNCATED = "the compressed data end too early: the file is truncated"
_LONE = re.compile("[\ud800-\udfff]")
_MARKS = (
    (b"\xff\xfe\x00\x00", "UTF-32"), (b"\x00\x00\xfe\xff", "UTF-32"), (b"\xff\xfe", "UTF-16"), (b"\xfe\xff", "UTF-16"),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class File:
    """A file, or a part of one.

    Attributes:
        name: what ids begin with.
        where: what messages and meta["source"] begin with.
        start: where the part begins and ends: bytes (`end` None: to the end), or row groups of a parquet file.
        line: the number of its first line or row.
        own_source: records say themselves where they are from (packaged corpora).
    """

    path: pathlib.Path
    name: str
    where: str
    start: int = 0
    end: int | None = None
    line: int = 1
    own_source: bool = False


class _Broken(Exception):
    """The rest of a file cannot be read."""

    def __init__(self, line: int | None, reason: str):
        super().__init__(reason)
        self.line, self.reason = line, reason


def format_of(name: str) -> tuple[str, str] | None:
    """Format and compression ("" for none) that a file's name tells; None: no reader has it."""
    path = pathlib.PurePosixPath(name.lower())
    packed = path.suffix if path.suffix in COMPRESSED else ""
    kind = FORMATS.get(path.with_suffix("").suffix if packed else path.suffix)
    return None if kind is None or (packed and kind == "parquet") else (kind, packed)


def read_file(file: File, spec: DataSpec, bad: Bad) -> Iterator[Document]:
    """The documents of a file, one after the other; line formats are never held whole."""
    found = format_of(file.path.name)
    assert found is not None, file
    kind, packed = found
    try:
        if kind == "parquet":
            yield from _parquet(file, spec, bad)
            return
        with _opened(file, packed) as stream:
            if kind in TEXTS and not (kind == "txt" and spec.txt != "file"):
                yield from _whole(file, kind, stream, bad)
            elif kind == "txt":
                yield from _pieces(file, spec.txt, stream, bad)
            elif kind == "jsonl":
                yield from _json_lines(file, spec, stream, bad)
            elif kind == "json":
                yield from _json(file, spec, stream, bad)
            else:
                yield from _csv(file, spec, kind, stream, bad)
    except _Broken as broken:
        bad(broken.line, broken.reason, "")
    except OSError as error:
        bad(None, f"cannot be read: {error.strerror or error}", "")


# --- bytes ------------------------------------------------------------------------------------------------------------


class _Zstd:
    """zstandard's own reader takes a truncated file for a whole one, and reads one frame of several."""

    def __init__(self, file: IO[bytes]):
        import zstandard

        self.file, self.error = file, zstandard.ZstdError
        self.make = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj
        self.frame: Any = None

    def read(self, size: int = -1) -> bytes:
        """The next bytes, about `size` of them; b"" at the end."""
        made = []
        while not made or size < 0:
            data = self.file.read(1 << 16)
            if not data:
                if self.frame is not None:
                    raise EOFError
                break
            while data:
                self.frame = self.frame or self.make()
                made.append(self.frame.decompress(data))
                data = self.frame.unused_data if self.frame.eof else b""
                if self.frame.eof:
                    self.frame = None
            if not any(made):
                made.clear()
        return b"".join(made)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


def _opened(file: File, packed: str):
    if packed and not file.path.stat().st_size:
        raise _Broken(None, _TRUNCATED)
    if packed == ".gz":
        import gzip

        return gzip.open(file.path)
    if packed == ".bz2":
        import bz2

        return bz2.open(file.path)
    if packed == ".xz":
        import lzma

        return lzma.open(file.path)
    if packed == ".zst":
        return _Zstd(file.path.open("rb"))
    stream = file.path.open("rb")
    stream.seek(file.start)
    return stream


def _blocks(file: File, stream) -> Iterator[tuple[int, bytes]]:
    """The part's bytes in blocks, without a byte-order mark, each with the offset of its first byte."""
    offset = file.start
    left = None if file.end is None else file.end - file.start
    first = file.start == 0
    if file.start and _foreign(file.path):
        return  # the part that begins the file tells of it
    _, packed = format_of(file.path.name) or ("", "")
    # Of damaged data `read` gives nothing of the last block, `read1` all that stands before the damage.
    take = stream.read1 if packed in (".gz", ".bz2", ".xz") else stream.read
    while left is None or left > 0:
        try:
            block = take(_BLOCK if left is None else min(left, _BLOCK))
        except EOFError:
            raise _Broken(None, _TRUNCATED) from None
        except (OSError, zlib.error, ValueError) as error:
            raise _Broken(None, f"not valid compressed data, or damaged: {error}") from None
        except Exception as error:  # the errors of lzma and zstandard, which are imported only when needed
            if type(error).__name__ not in ("LZMAError", "ZstdError"):
                raise
            raise _Broken(None, f"not valid compressed data, or damaged: {error}") from None
        if not block:
            return
        if left is not None:
            left -= len(block)
        if first:
            first = False
            for mark, encoding in _MARKS:
                if block.startswith(mark):
                    raise _Broken(None, f"the file is {encoding}, its byte-order mark says; convert it to UTF-8")
            if block.startswith(b"\xef\xbb\xbf"):
                offset, block = 3, block[3:]
        if block:
            yield offset, block
        offset += len(block)


def _foreign(path: pathlib.Path) -> bool:
    """Whether a file begins with the mark of another encoding than UTF-8."""
    with path.open("rb") as stream:
        return stream.read(4).startswith(tuple(mark for mark, _ in _MARKS))


def _lines(file: File, stream) -> Iterator[tuple[int, int, bytes]]:
    """Number of a line, offset of its first byte, and the line with its end."""
    number, offset = file.line, -1
    held: list[bytes] = []
    try:
        for place, block in _blocks(file, stream):
            offset = place if offset < 0 else offset
            if b"\n" not in block and b"\r" not in block:
                held.append(block)  # joined once, where the line ends: long lines take time in proportion
                continue
            # \n, \r\n and \r end the lines of bytes; str.splitlines knows many more.
            lines = b"".join([*held, block]).splitlines(keepends=True)
            # The last may go on, or be the first half of \r\n.
            held = [] if lines[-1].endswith(b"\n") else [lines.pop()]
            for line in lines:
                yield number, offset, line
                number, offset = number + 1, offset + len(line)
    except _Broken as broken:
        raise _Broken(number if broken.line is None and number > file.line else None, broken.reason) from None
    for line in b"".join(held).splitlines(keepends=True):
        yield number, offset, line
        number, offset = number + 1, offset + len(line)


def _decode(data: bytes, number: int, offset: int, bad: Bad) -> str | None:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        before = data[: error.start].splitlines(keepends=True)
        ended = sum(line.endswith((b"\n", b"\r")) for line in before)
        bad(number + ended, f"byte 0x{data[error.start]:02x} at offset {offset + error.start} is not UTF-8; convert "
            "the file to UTF-8", _shown(data.decode("utf-8", "backslashreplace")))  # fmt: skip
        return None


def _shown(record: str) -> str:
    return record if len(record) <= _KEPT else record[:_KEPT] + "…"


# --- texts ------------------------------------------------------------------------------------------------------------


def _whole(file: File, kind: str, stream, bad: Bad) -> Iterator[Document]:
    text = _decode(*_all(file, stream), bad)
    if text is not None:
        meta = {"source": file.where} | ({"format": "html"} if kind == "html" else {})
        yield Document(file.name.removesuffix(".txt"), text, meta)


def _all(file: File, stream) -> tuple[bytes, int, int]:
    """All bytes, the number of their first line and their offset, for `_decode`."""
    blocks = list(_blocks(file, stream))
    return b"".join(block for _, block in blocks), 1, blocks[0][0] if blocks else 0


def _pieces(file: File, piece: str, stream, bad: Bad) -> Iterator[Document]:
    """Lines, or paragraphs: lines up to a blank one."""
    held: list[bytes] = []
    first = start = 0
    for number, offset, line in _lines(file, stream):
        if line.strip():
            if not held:
                first, start = number, offset
            held.append(line)
        if held and (piece == "line" or not line.strip()):
            yield from _piece(file, held, first, start, bad)
            held = []
    if held:
        yield from _piece(file, held, first, start, bad)


def _piece(file: File, lines: list[bytes], number: int, offset: int, bad: Bad) -> Iterator[Document]:
    text = _decode(b"".join(lines).rstrip(b"\r\n"), number, offset, bad)
    if text is not None:
        yield Document(f"{file.name}:{number}", text, {"source": f"{file.where}:{number}"})


# --- records ----------------------------------------------------------------------------------------------------------


class Records:
    """Turns records into documents by the names in the spec; keeps the ids of one file apart."""

    def __init__(self, file: File, spec: DataSpec, bad: Bad):
        self.file, self.spec, self.bad = file, spec, bad
        self.ids: set[str] = set()
        self.fields = {name: spec.text if name == "text" else name for name in spec.fields}

    def lacking(self, columns) -> str | None:
        """What is said when the columns of a table, or the keys of a record, lack one that is asked for."""
        wanted = [(f"data.{'text' if name == 'text' else 'fields'}", key) for name, key in self.fields.items()]
        wanted += [("data.label", self.spec.label), ("data.answer", self.spec.answer)]
        for setting, key in wanted:
            if key and key not in columns:
                return f"there is no {key!r}, only {', '.join(map(repr, columns)) or 'nothing'}; {setting} names it"
        return None

    def documents(self, record: object, number: int, raw: str | None = None) -> Iterator[Document]:
        """One document, or none after a word to `bad`; `raw` is how the record stands in the file."""
        reason = ""
        if self.spec.form != messages.TEXT:
            record, reason = messages.normalised(record, self.spec.form)
            if not reason:  # the text stands last: what is wrong with a message is said of the message
                record.pop(self.spec.text, None)
                record[self.spec.text] = messages.transcript(record, self.spec.form)
        reason = reason or self._refused(record, raw)
        if reason:
            self.bad(number, reason, _shown(json.dumps(record, default=str) if raw is None else raw))
            return
        assert isinstance(record, dict)
        spec, file = self.spec, self.file
        own = self._own_id(record)
        meta = {key: value for key, value in record.items() if key != spec.text and (key != spec.id or own is None)}
        if not file.own_source:
            if "source" in meta:
                meta["record_source"] = meta["source"]
            meta["source"] = f"{file.where}:{number}"
        if own is not None and len(self.ids) < _IDS:
            self.ids.add(str(own))
        yield Document(str(own) if own is not None else f"{file.name}:{number}", record[spec.text], meta)

    def _own_id(self, record: dict) -> object:
        """The id that a record brings; a blank one, as csv has where there is none, is none."""
        own = record.get(self.spec.id) if self.spec.id else None
        return None if own == "" else own

    def _refused(self, record: object, raw: str | None) -> str | None:
        spec = self.spec
        if not isinstance(record, dict):
            return f"expected an object with a text under {spec.text!r}, not {_short(record)}"
        if lacking := self.lacking(record):
            return lacking
        for key in self.fields.values():
            if not isinstance(record[key], str):
                return f"{key!r} is {_short(record[key])}, expected a text"
        if spec.label and (not isinstance(record[spec.label], str | int) or isinstance(record[spec.label], bool)):
            return f"{spec.label!r} is {_short(record[spec.label])}, expected a label: a text or a whole number"
        own = self._own_id(record)
        if own is not None and (not isinstance(own, str | int) or isinstance(own, bool)):
            return f"{spec.id!r} is {_short(own)}, expected an id: a text or a whole number; data.id names it"
        if own is not None and str(own) in self.ids:
            return f"the id {own!r} stands twice in the file"
        if raw is None or "\\u" in raw:  # no bytes that are UTF-8 decode to a surrogate, only escapes do
            for key, value in record.items():
                lone = _LONE.search(json.dumps([key, value], ensure_ascii=False) if key != spec.text else value)
                if lone:
                    place = f"the text has a lone surrogate U+{ord(lone[0]):04X} at character {lone.start()}"
                    other = f"{key!r} has a lone surrogate U+{ord(lone[0]):04X}"
                    return f"{place if key == spec.text else other}; it is not valid Unicode"
        return None


def _short(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else text[:39] + "…"


def _no_constant(name: str):
    raise ValueError(f"{name} is no JSON number")


def _parse(text: str) -> tuple[object, str]:
    """The value, and what is wrong with it ("" for nothing)."""
    try:
        return json.loads(text, parse_constant=_no_constant), ""
    except RecursionError:
        return None, "not JSON that can be read: too many brackets inside each other"
    except ValueError as error:
        return None, f"not JSON: {error}"


def _json_lines(file: File, spec: DataSpec, stream, bad: Bad) -> Iterator[Document]:
    records = Records(file, spec, bad)
    for number, offset, line in _lines(file, stream):
        if not line.strip():
            continue
        text = _decode(line, number, offset, bad)
        if text is None:
            continue
        record, wrong = _parse(text)
        if wrong:
            bad(number, wrong, _shown(text))
        else:
            yield from records.documents(record, number, text)


def _json(file: File, spec: DataSpec, stream, bad: Bad) -> Iterator[Document]:
    """A list of records, or one; the number is the record's place in the list. The file is held whole."""
    text = _decode(*_all(file, stream), bad)
    if text is None or not text.strip():
        return
    value, wrong = _parse(text)
    if wrong:
        raise _Broken(None, f"{wrong}; a file of one record a line is a .jsonl file")
    records = Records(file, spec, bad)
    for number, record in enumerate(value if isinstance(value, list) else [value], 1):
        yield from records.documents(record, number)


class _Rows:
    """The lines of a csv file for csv.reader, and what belongs to the row that it is reading."""

    def __init__(self, file: File, stream):
        self.lines = _lines(file, stream)
        self.held: list[tuple[int, int, bytes]] = []
        self.again: collections.deque[tuple[int, int, bytes]] = collections.deque()

    def retry(self) -> None:
        """Gives all lines of the row but its first once more: an open quote must not swallow the rest of the file."""
        self.again.extendleft(reversed(self.held[1:]))
        del self.held[1:]

    def __iter__(self):
        return self

    def __next__(self) -> str:
        line = self.again.popleft() if self.again else next(self.lines)
        self.held.append(line)
        # A row with bytes that are not UTF-8 is refused as a whole, when it is known where it ends.
        return line[2].decode("utf-8", "surrogateescape")


def _csv(file: File, spec: DataSpec, kind: str, stream, bad: Bad) -> Iterator[Document]:
    csv.field_size_limit(_FIELD)
    rows = _Rows(file, stream)
    reader = csv.reader(rows, "excel-tab" if kind == "tsv" else "excel", strict=True)
    records, header = Records(file, spec, bad), None
    while True:
        rows.held.clear()
        wrong, row = "", []
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            wrong = f"not {kind}: {error}; a quote inside a quoted field is written twice"
            rows.retry()
            reader = csv.reader(rows, "excel-tab" if kind == "tsv" else "excel", strict=True)
        number, offset, raw = rows.held[0][0], rows.held[0][1], b"".join(line for _, _, line in rows.held)
        text = _decode(raw, number, offset, bad)
        if text is None:
            if header is None:
                raise _Broken(number, "the header cannot be read")
            continue
        if not wrong and header is not None and row and len(row) != len(header):
            wrong = f"the row has {len(row)} columns, the header {len(header)}"
        if wrong:
            if header is None:
                raise _Broken(number, wrong)
            bad(number, wrong, _shown(text))
        elif header is None:
            if row:
                header = row
                _check_header(header, number, records)
        elif row:
            yield from records.documents(dict(zip(header, row)), number, text)


def _check_header(header: list[str], number: int, records: Records) -> None:
    doubled = {name for name in header if header.count(name) > 1}
    if doubled:
        raise _Broken(number, f"the header names {min(doubled)!r} twice")
    if lacking := records.lacking(header):
        raise _Broken(number, lacking)


def _parquet(file: File, spec: DataSpec, bad: Bad) -> Iterator[Document]:
    """Rows by batches. Binary columns are left; dates and decimals become text, numbers that JSON lacks None."""
    import pyarrow
    import pyarrow.parquet
    import pyarrow.types

    number, records = file.line, Records(file, spec, bad)
    try:
        with pyarrow.parquet.ParquetFile(file.path) as table:
            schema = table.schema_arrow
            if lacking := records.lacking(schema.names):
                raise _Broken(None, lacking)
            columns = [field.name for field in schema if not _binary(pyarrow, field.type)]
            groups = range(file.start, table.num_row_groups if file.end is None else file.end)
            for batch in table.iter_batches(256, row_groups=list(groups), columns=columns, use_threads=False):
                for record in _rows(batch):
                    if isinstance(record, UnicodeDecodeError):
                        bad(number, f"the row has a text that is not UTF-8 ({record.reason})", "")
                    else:
                        yield from records.documents(json_value(record), number)
                    number += 1
    except pyarrow.ArrowException as error:
        raise _Broken(None, f"not parquet, or damaged: {' '.join(str(error).split())[:200]}") from None


def _rows(batch) -> list:
    """The rows of a record batch, in place of some the error."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        rows = []
        for number in range(batch.num_rows):
            try:
                rows += batch.slice(number, 1).to_pylist()
            except UnicodeDecodeError as error:
                rows.append(error)
        return rows


def _binary(pyarrow, kind) -> bool:
    return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind) or "binary" in str(kind)


def json_value(value):
    """A value of a table as JSON has it: NaN and infinities None, dates and the like as text."""
    if isinstance(value, float):
        return value if value - value == 0 else None
    if value is None or isinstance(value, str | int | bool):
        return value
    if isinstance(value, dict):
        return {str(key): json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(item) for item in value]
    return str(value)
