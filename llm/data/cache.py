"""The cache of fetched files, $LLM_CACHE or ~/.cache/llm: nothing gets a name in it before it is whole."""

import contextlib
import hashlib
import http.client
import os
import pathlib
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator

from llm.errors import InputError

_BLOCK = 1 << 20


def folder() -> pathlib.Path:
    """The folder that fetched files are kept in."""
    named = os.environ.get("LLM_CACHE")
    return pathlib.Path(named) if named else pathlib.Path.home() / ".cache" / "llm"


@contextlib.contextmanager
def scratch(parent: pathlib.Path) -> Iterator[pathlib.Path]:
    """A new folder below `parent`, gone at the end unless `put` has named it.

    Raises:
        InputError: the cache cannot be written.
    """
    try:
        parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(prefix=".part-", dir=parent, ignore_cleanup_errors=True)
    except OSError as error:
        raise InputError(f"{parent}: the cache cannot be written ({error.strerror}); set LLM_CACHE") from None
    with temporary as made:
        inner = pathlib.Path(made) / "files"
        inner.mkdir()
        yield inner


def put(made: pathlib.Path, name: pathlib.Path) -> None:
    """Gives a finished folder its name; another process may have been faster, and its folder is then the one."""
    try:
        os.rename(made, name)
    except OSError:
        if not name.is_dir():
            raise


def name_of(url: str) -> str:
    """The name of the file that an address ends in."""
    return pathlib.PurePosixPath(urllib.parse.unquote(urllib.parse.urlsplit(url).path)).name


def download(url: str) -> pathlib.Path:
    """The file at an http(s) address, downloaded once: later calls take it from the cache.

    Raises:
        InputError: the server cannot be reached or refuses, the file came in part, or with no word of its length.
    """
    kept = folder() / "downloads" / hashlib.sha256(url.encode()).hexdigest()[:16]
    if not kept.is_dir():
        with scratch(kept.parent) as made:
            _stream(url, made / name_of(url))
            put(made, kept)
    return kept / name_of(url)


def _stream(url: str, target: pathlib.Path) -> None:
    from tqdm import tqdm

    request = urllib.request.Request(url, headers={"Accept-Encoding": "identity", "User-Agent": "llm-research"})
    came = 0
    with target.open("wb") as file:
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                told = answer.headers.get("Content-Length")
                if told is None and not answer.chunked:
                    raise ValueError("the server does not say how long the file is: a part could pass for the whole")
                total = None if told is None else int(told)
                with tqdm(total=total, desc=target.name, unit="B", unit_scale=True, delay=1, leave=False) as bar:
                    for block in iter(lambda: answer.read(_BLOCK), b""):
                        file.write(block)
                        came += len(block)
                        bar.update(len(block))
        except urllib.error.HTTPError as error:
            raise InputError(f"{url}: the server answers {error.code} {error.reason}; check the address") from None
        except (http.client.HTTPException, urllib.error.URLError, ConnectionError, TimeoutError, ValueError) as error:
            reason = getattr(error, "reason", None) or error
            raise InputError(f"{url}: could not be downloaded ({reason or type(error).__name__}); try again") from None
    if total is not None and came != total:
        raise InputError(f"{url}: {came:,} of {total:,} bytes came; try again")
