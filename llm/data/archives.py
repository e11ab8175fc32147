"""Archives of packages, read without unpacking: .tar.gz, .tgz, .whl, .zip, .deb."""

import io
import pathlib
import tarfile
import zipfile
from collections.abc import Iterator

from llm.errors import InputError


def members(archive: pathlib.Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the files of an archive, and of the .tar.gz files in it.

    Raises:
        InputError: it is no such archive, or damaged.
    """
    try:
        yield from _members(archive.name, archive.read_bytes())
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError, ValueError) as error:
        raise InputError(f"{archive}: the archive cannot be read: {error}") from None


def _members(name: str, data: bytes) -> Iterator[tuple[str, bytes]]:
    if name.endswith((".whl", ".zip")):
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            for entry in file.infolist():
                if not entry.is_dir():
                    yield entry.filename, file.read(entry)
        return
    if name.endswith(".deb"):
        name, data = next((name, data) for name, data in _ar(data) if name.startswith("data.tar"))
    with tarfile.open(fileobj=io.BytesIO(data)) as file:
        for entry in file:
            content = file.extractfile(entry)
            if content is None:
                continue
            if entry.name.endswith((".tar.gz", ".tgz")):
                yield from _members(entry.name, content.read())
            else:
                yield entry.name, content.read()


def _ar(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Members of an ar archive: headers of 60 bytes, name in the first 16, size in 10 from 48; contents padded to 2."""
    if not data.startswith(b"!<arch>\n"):
        raise ValueError("it does not begin like an ar archive")
    place = 8
    while place + 60 <= len(data):
        name, size = data[place : place + 16].decode().strip(" /"), int(data[place + 48 : place + 58])
        yield name, data[place + 60 : place + 60 + size]
        place += 60 + size + size % 2
