"""Bytes of files, compressed or not, as lines and as text: with line numbers and offsets, and in little memory.

Lines end with LF, CR LF or CR, never with another character that Unicode counts as a line end. Text is UTF-8; its
byte-order mark is taken off.
"""

import bz2
import contextlib
import dataclasses
import gzip
import lzma
import pathlib
import zlib
from collections.abc import Iterator
from typing import Any

from llm.errors import InputError

FORMATS = (".txt", ".md", ".html", ".htm", ".jsonl", ".csv", ".tsv", ".parquet")
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
CHUNK = 1 << 20


@dataclasses.dataclass(frozen=True)
class File:
    """A file, or a part of one, to be read.

    Attributes:
        path: where it is.
        name: its path in the source, from which ids are made; `path` alone tells the format.
        shown: what messages and meta["source"] call it.
        start: offset of the first byte of the part, which begins a line; of parquet the first row group.
        end: offset behind the last byte, row group behind the last; None reads to the end.
        line: number of the first line (of parquet: row), from 1.
    """

    path: pathlib.Path
    name: str
    shown: str
    start: int = 0
    end: int | None = None
    line: int = 1


@dataclasses.dataclass(frozen=True)
class Line:
    """A line with its end, its number from 1, and the offset of its first byte in the uncompressed file."""

    number: int
    offset: int
    data: bytes


class BadRecord(Exception):
    """A record that makes no document; the message is the reason."""


class NotUTF8(BadRecord):
    """Bytes that are not UTF-8, the first of them at `offset` of the file."""

    def __init__(self, byte: int, offset: int):
        super().__init__(f"byte 0x{byte:02x} at offset {offset} is not UTF-8; convert the file to UTF-8")
        self.offset = offset


class Unreadable(Exception):
    """Nothing more can be read of a file, from `line` on where some of it was read; the message is the reason."""

    def __init__(self, reason: str, line: int | None = None):
        super().__init__(reason)
        self.line = line


def format_of(name: str) -> tuple[str, str] | None:
    """The format and the compression ("" for none) that a file's name tells, None for a name of neither."""
    stem, compression = name.lower(), ""
    for suffix in COMPRESSIONS:
        if stem.endswith(suffix):
            stem, compression = stem.removesuffix(suffix), suffix
    for suffix in FORMATS:
        if stem.endswith(suffix) and not (compression and suffix == ".parquet"):
            return suffix, compression
    return None


class _Zstandard:
    """A .zst file as a stream. A file that ends inside a frame is an EOFError, which zstandard's own reader is not."""

    def __init__(self, path: pathlib.Path):
        try:
            import zstandard
        except ImportError:
            raise InputError(f"{path}: .zst files need zstandard; pip install zstandard") from None
        self._new = lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
        self._file, self._frame, self._waiting = path.open("rb"), None, b""

    def read(self, size: int) -> bytes:
        """Some bytes, b"" at the end; `size` is only a measure of how many."""
        while True:
            data = self._waiting or self._file.read(min(size, 1 << 16))
            self._waiting = b""
            if not data:
                if self._frame is not None:
                    raise EOFError("the file ends inside a frame")
                return b""
            self._frame = self._frame or self._new()
            out = self._frame.decompress(data)
            if self._frame.eof:
                self._waiting, self._frame = self._frame.unused_data, None
            if out:
                return out

    def close(self) -> None:
        self._file.close()


def _open(path: pathlib.Path, compression: str) -> Any:
    openers = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": lambda path, _: _Zstandard(path)}
    return openers.get(compression, open)(path, "rb")


def _chunks(file: File) -> Iterator[bytes]:
    """The bytes of a file or of its part, uncompressed.

    Raises:
        Unreadable: it is not there, not allowed, damaged, cut short.
    """
    _, compression = format_of(file.path.name) or ("", "")
    try:
        with contextlib.closing(_open(file.path, compression)) as stream:
            if file.start:
                stream.seek(file.start)
            left = None if file.end is None else file.end - file.start
            while left != 0 and (chunk := stream.read(CHUNK if left is None else min(CHUNK, left))):
                left = None if left is None else left - len(chunk)
                yield chunk
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise Unreadable(f"the {compression} file is cut short or damaged: {error}") from None
    except OSError as error:
        # bz2 says of damaged data only that an operating system never said it.
        damaged = f"the {compression} file is damaged: {error}"
        raise Unreadable(f"cannot be read: {error.strerror}" if error.strerror else damaged) from None
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "zstandard":
            raise
        raise Unreadable(f"the {compression} file is damaged: {error}") from None


_MARKS = ((b"\xff\xfe\0\0", "UTF-32"), (b"\0\0\xfe\xff", "UTF-32"), (b"\xff\xfe", "UTF-16"), (b"\xfe\xff", "UTF-16"))
BOM = b"\xef\xbb\xbf"


def _marked(data: bytes) -> str | None:
    return next((name for mark, name in _MARKS if data.startswith(mark)), None)


def text_chunks(file: File) -> Iterator[bytes]:
    """As `_chunks`, of a file that is UTF-8 by its byte-order mark or has none."""
    if file.start:
        with contextlib.suppress(OSError), file.path.open("rb") as stream:
            if _marked(stream.read(4)):
                return  # the part that holds the mark tells of it
    first = not file.start
    for chunk in _chunks(file):
        if first and (encoding := _marked(chunk)):
            raise Unreadable(f"the file begins with the byte-order mark of {encoding}; convert the file to UTF-8")
        yield chunk
        first = False


def lines(file: File) -> Iterator[Line]:
    """The lines of a file or of its part.

    Raises:
        Unreadable: as `text_chunks`, with the number of the line that could not be read to its end.
    """
    number, offset = file.line, file.start
    rest: list[bytes] = []
    try:
        for chunk in text_chunks(file):
            if offset == 0 and not rest and chunk.startswith(BOM):
                chunk, offset = chunk[3:], 3
            if b"\n" not in chunk and b"\r" not in chunk:
                rest.append(chunk)
                continue
            pieces = b"".join([*rest, chunk]).splitlines(keepends=True)
            # The last piece may go on, or be the first half of CR LF.
            rest = [] if pieces[-1].endswith(b"\n") else [pieces.pop()]
            for piece in pieces:
                yield Line(number, offset, piece)
                number, offset = number + 1, offset + len(piece)
    except Unreadable as error:
        raise Unreadable(str(error), number if rest or number > file.line else None) from None
    for piece in b"".join(rest).splitlines(keepends=True):
        yield Line(number, offset, piece)
        number, offset = number + 1, offset + len(piece)


def decode(data: bytes, offset: int = 0) -> str:
    """Text of UTF-8 bytes that begin at `offset` of their file.

    Raises:
        NotUTF8: they are not.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise NotUTF8(data[error.start], offset + error.start) from None


def raw(data: bytes) -> str:
    """Bytes as text to show, with escapes for what is not UTF-8."""
    return data.decode("utf-8", "backslashreplace")
