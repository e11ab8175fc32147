"""The cache: what was fetched from elsewhere, each thing whole or not there."""

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

TIMEOUT = 60  # seconds without a byte
CHUNK = 1 << 20


def folder() -> pathlib.Path:
    """The cache folder: $LLM_CACHE, or ~/.cache/llm."""
    return pathlib.Path(os.environ.get("LLM_CACHE") or pathlib.Path.home() / ".cache" / "llm")


@contextlib.contextmanager
def appearing(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """A new folder to fill, which becomes `target` when all went well and is removed when not.

    Two processes may fill one target at once: the first that is done wins.

    Raises:
        InputError: the cache cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as partial:
            made = pathlib.Path(partial) / target.name
            made.mkdir()
            yield made
            try:
                made.rename(target)
            except OSError:
                if not target.is_dir():
                    raise
    except OSError as error:
        reason = error.strerror or error
        raise InputError(
            f"{target.parent}: the cache cannot be written ({reason}); set LLM_CACHE to a folder"
        ) from None


def url_folder(url: str) -> pathlib.Path:
    """Where the file of an address is kept, beside its sha256."""
    return folder() / "urls" / hashlib.sha256(url.encode()).hexdigest()[:16]


def url_name(url: str) -> str:
    """The name of an address's file."""
    return os.path.basename(urllib.parse.unquote(urllib.parse.urlsplit(url).path)) or "index.html"


def download(url: str) -> pathlib.Path:
    """The folder that holds an address's file; fetched when it is not there, with a progress bar.

    Raises:
        InputError: no answer, an answer that is no file, or one that broke off.
    """
    target = url_folder(url)
    if target.is_dir():
        return target
    with appearing(target) as made:
        digest = _stream(url, made / url_name(url))
        (made / ".sha256").write_text(digest)
    return target


def digest(url: str) -> str:
    """The sha256 of an address's file as it was fetched."""
    return (download(url) / ".sha256").read_text()


def _stream(url: str, path: pathlib.Path) -> str:
    import tqdm

    summed, got = hashlib.sha256(), 0
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
            length = answer.headers.get("Content-Length")
            expected = int(length) if length else None
            with path.open("wb") as file, tqdm.tqdm(
                total=expected, desc=path.name, unit="B", unit_scale=True, unit_divisor=1024, leave=False
            ) as bar:  # fmt: skip
                while chunk := answer.read(CHUNK):
                    file.write(chunk)
                    summed.update(chunk)
                    got += len(chunk)
                    bar.update(len(chunk))
    except urllib.error.HTTPError as error:
        raise InputError(f"{url}: the server answers {error.code} {error.reason}") from None
    except (http.client.HTTPException, ConnectionError, TimeoutError, urllib.error.URLError, ValueError) as error:
        reason = getattr(error, "reason", None) or error or type(error).__name__
        raise InputError(f"{url}: the file cannot be fetched: {reason}") from None
    if expected is not None and got != expected:
        raise InputError(f"{url}: the answer broke off after {got:,} of {expected:,} bytes; give the command again")
    return summed.hexdigest()
