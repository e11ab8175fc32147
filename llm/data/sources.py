"""Reading documents: a packaged corpus by name, a folder, a .txt file (one document) or a .jsonl file (one a line)."""

import dataclasses
import hashlib
import importlib.resources
import json
import lzma
import pathlib
import re
from collections.abc import Iterator

from llm.errors import InputError

SUFFIXES = (".txt", ".jsonl")


@dataclasses.dataclass(frozen=True)
class Document:
    """A text, an id that is unique in its source, and what is known of it (`meta["source"]`: where it came from)."""

    id: str
    text: str
    meta: dict = dataclasses.field(default_factory=dict)

    @property
    def hash(self) -> str:
        """A hash of the text alone."""
        return hashlib.sha256(self.text.encode("utf-8", "surrogatepass")).hexdigest()


def packaged_corpora() -> list[str]:
    """Names of the corpora that ship with the package."""
    return sorted(e.name for e in importlib.resources.files("llm.data").joinpath("corpora").iterdir() if e.is_dir())


def read(source: str) -> list[Document]:
    """All documents of a source, in order of their ids' places: files by name, lines by number.

    Raises:
        InputError: no such source, no text in it, bytes that are not UTF-8 (file and offset), a bad JSON line.
    """
    if source in packaged_corpora():
        documents = list(_packaged(source))
    else:
        documents = list(_path(source))
    documents = [d for d in documents if d.text.strip()]
    if not documents:
        raise InputError(f"{source}: the corpus is empty, there is no text in it")
    return documents


def stamp(source: str) -> str | None:
    """A mark that changes when files of a source come, go or change size; None when the source is no longer there."""
    if source in packaged_corpora():
        return source
    path = pathlib.Path(source)
    if not path.exists():
        return None
    listed = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in SUFFIXES)
    lines = [f"{p.relative_to(path).as_posix()} {p.stat().st_size}" for p in listed]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _packaged(name: str) -> Iterator[Document]:
    folder = importlib.resources.files("llm.data").joinpath("corpora", name)
    for entry in sorted(folder.iterdir(), key=lambda e: e.name):
        if entry.name.endswith(".txt.xz"):
            text = lzma.decompress(entry.read_bytes()).decode("utf-8")
            yield Document(entry.name.removesuffix(".txt.xz"), text, {"source": f"{name}/{entry.name}"})


def _path(source: str) -> Iterator[Document]:
    path = pathlib.Path(source)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in SUFFIXES)
        if not files:
            raise InputError(f"{source}: the corpus is empty, the folder holds no {' or '.join(SUFFIXES)} file")
        for file in files:
            yield from _file(file, file.relative_to(path).as_posix())
    elif path.is_file():
        if path.suffix not in SUFFIXES:
            raise InputError(f"{source}: expected a {' or '.join(SUFFIXES)} file or a folder of them")
        yield from _file(path, path.name)
    else:
        raise InputError(
            f"there is no corpus {source!r}: no path, no packaged corpus ({', '.join(packaged_corpora())})"
        )


def _file(path: pathlib.Path, name: str) -> Iterator[Document]:
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # utf-8-sig counts from behind the byte-order mark.
        offset = error.start + (3 if data.startswith(b"\xef\xbb\xbf") else 0)
        raise InputError(
            f"{path}: byte 0x{data[offset]:02x} at offset {offset} is not UTF-8; convert the file to UTF-8"
        ) from None
    if path.suffix == ".txt":
        yield Document(name.removesuffix(".txt"), text, {"source": str(path)})
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}:{number}: not JSON: {error}") from None
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise InputError(f'{path}:{number}: expected an object with a text under "text"')
        lone = re.search("[\ud800-\udfff]", record["text"])
        if lone:
            raise InputError(
                f"{path}:{number}: the text has a lone surrogate U+{ord(lone[0]):04X} at character {lone.start()}; "
                "it is not valid Unicode"
            )
        meta = {key: value for key, value in record.items() if key not in ("id", "text")}
        yield Document(
            str(record.get("id", f"{name}:{number}")), record["text"], {**meta, "source": f"{path}:{number}"}
        )
