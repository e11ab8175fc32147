"""What the real corpora taught, each lesson on a small made-up input. See experiments/corpora.

Lessons that stand elsewhere: blank rows of tab files, shortcut marks, mails of many encodings (test_packaged.py);
control characters of either kind (test_clean.py); a training text that stands in the test set (test_preparation.py).
"""

import base64
import json

import pytest

from llm.data import CleanSpec, DataSpec, Execution, Preparation, open_prepared, packages, prepare, report
from llm.data.clean import stages
from llm.data.documents import Document, Dropped
from llm.data.quality import stage as quality
from llm.data.split import held_out
from llm.tokenization import TokenizerSpec


def silent(*_, **__):
    pass


def cleaned(text, spec, **meta):
    document = Document("d", text, meta)
    for _, stage in stages(spec):
        document = stage(document, silent)
        if isinstance(document, Dropped):
            break
    return document


# --- mails ------------------------------------------------------------------------------------------------------------


def test_a_mail_is_its_subject_and_body_without_its_headers():
    mail = b"Received: from host [10.0.0.1]\nFrom: a@example.com\nSubject: =?ISO-8859-1?Q?caf=E9?=\n news\n\nbody\n"
    assert packages.mail_text(mail) == ("café news\n\nbody\n", "text")
    assert packages.mail_text(b"no header at all") == ("\n\nno header at all", "text")


def test_bodies_of_mails_are_decoded():
    head = b"Content-Type: text/plain; charset=iso-8859-1\nContent-Transfer-Encoding: quoted-printable\n\n"
    quoted = head + b"=A3 5 for =\nall"
    assert packages.mail_text(quoted)[0] == "\n\n£ 5 for all"
    body = base64.b64encode("价格".encode("gb2312"))
    coded = b"Content-Type: text/plain; charset=gb2312\nContent-Transfer-Encoding: base64\n\n" + body
    assert packages.mail_text(coded)[0] == "\n\n价格"
    japanese = b"Content-Type: text/plain; charset=iso-2022-jp\n\n" + "日本語".encode("iso2022_jp")
    assert packages.mail_text(japanese)[0] == "\n\n日本語"


def test_a_charset_that_stands_anywhere_in_a_mail_is_tried_on_what_names_none():
    subject = "(광고) 안내".encode("euc_kr")
    mail = b"Subject: " + subject + b"\nContent-Type: text/plain; charset=euc-kr\n\n" + "안녕".encode("euc_kr")
    assert packages.mail_text(mail) == ("(광고) 안내\n\n안녕", "text")
    # A name that no one knows is passed over.
    mail = b"Content-Type: text/plain; charset=DEFAULT_CHARSET\n\nnow\x92s"
    assert packages.mail_text(mail)[0] == "\n\nnow’s"


def parts(kind, *inner):
    head = f"Subject: s <1>\nContent-Type: multipart/{kind}; boundary=B\n\n".encode()
    return head + b"".join(b"--B\n" + part + b"\n" for part in inner) + b"--B--\n"


def test_parts_of_mails():
    plain, page = b"Content-Type: text/plain\n\nplain", b"Content-Type: text/html\n\n<p>page</p>"
    blank = b"Content-Type: text/plain\n\n \n"
    attached = b"Content-Type: text/plain\nContent-Disposition: attachment; filename=a.txt\n\nattached"
    image = b"Content-Type: image/gif\n\nGIF"
    assert packages.mail_text(parts("alternative", plain, page)) == ("s <1>\n\nplain", "text")
    assert packages.mail_text(parts("alternative", blank, page)) == ("<p>s &lt;1&gt;</p>\n<p>page</p>", "html")
    assert packages.mail_text(parts("mixed", plain, attached, image)) == ("s <1>\n\nplain", "text")
    text, kind = packages.mail_text(parts("mixed", page, plain))
    result = cleaned(text, CleanSpec(markup=True), format=kind)
    assert isinstance(result, Document) and result.text == "s <1>\n\npage\n\nplain\n"


def test_undeclared_windows_quotes_of_a_latin_mail_are_repaired():
    mail = b"Content-Type: text/plain; charset=iso-8859-1\n\n\x93so\x94 \x96 now\x92s"
    result = cleaned(packages.mail_text(mail)[0], CleanSpec())
    assert isinstance(result, Document) and result.text == "“so” – now’s\n"


# --- rules and languages ----------------------------------------------------------------------------------------------


def test_rules_for_web_pages_refuse_novels_and_speeches():
    sentence = "It was the day that they had waited for, and everyone of the town was there with flowers and flags. "
    novel = Document("d", "\n".join([sentence] * 6000))
    result = quality(("gopher_quality",))(novel, silent)
    assert isinstance(result, Dropped) and result.reason == "gopher_quality: gopher_long_doc"
    speech = Document("d", 'An address is one line, and ends as the speaker cites: "Peace, good will toward men."\n')
    result = quality(("fineweb",))(speech, silent)
    assert isinstance(result, Dropped) and result.reason == "fineweb: line_punct_ratio"


def test_plain_mandarin_is_also_taken_for_wu():
    text = "千只丹顶鹤光顾盐城\n入冬以来，１０００多只丹顶鹤陆续飞抵盐城自然保护区越冬，吸引了众多游客前往观看。\n"
    assert isinstance(cleaned(text, CleanSpec(languages=("zh", "wuu", "yue"))), Document)
    assert isinstance(cleaned(text, CleanSpec(languages=("en",))), Dropped)


@pytest.mark.parametrize("text", ["See a doctor for persistent symptoms.", "Check social media for clues"])
def test_a_sentence_is_little_to_tell_a_language_by(text):
    assert isinstance(cleaned(text, CleanSpec(languages=("en", "pcm"), language_confidence=0.02)), Document)
    assert isinstance(cleaned(text, CleanSpec(languages=("en",))), Dropped)
    german = "Das Zwei- und das Einbein entfielen bei dieser Ausführung."
    assert isinstance(cleaned(german, CleanSpec(languages=("en", "pcm"), language_confidence=0.02)), Dropped)


# --- labels, pairs, pictures ------------------------------------------------------------------------------------------


def made(tmp_path, name, records, **settings):
    path = tmp_path / f"{name}.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in records))
    spec = Preparation(
        data=DataSpec(train=str(path), packing="whole", row_length=32, **settings),
        tokenizer=TokenizerSpec(kind="bytes"),
    )
    prepare(spec, tmp_path / name, silent, Execution(workers=1), quiet=True)
    removed = (tmp_path / name / "data" / "removed.jsonl").read_text().splitlines()
    return open_prepared(tmp_path / name).report, [json.loads(line) for line in removed]


def test_one_text_under_two_labels_stays_once_whatever_the_order(tmp_path):
    records = [{"text": f"review {n}", "label": "pos" if n % 2 else "neg", "id": f"r{n}"} for n in range(40)]
    records += [{"text": "Not bad!", "label": "pos", "id": "a"}, {"text": "not bad", "label": "neg", "id": "b"}]
    first, removed = made(tmp_path, "one", records, label="label")
    again, others = made(tmp_path, "two", records[::-1], label="label")
    assert [(r["id"], r["kept"]) for r in removed] == [("b", "a")] == [(r["id"], r["kept"]) for r in others]
    assert first["train"]["documents"] + first["validation"]["documents"] == 41
    assert first["labels"] == again["labels"] == ["neg", "pos"]


def test_pairs_with_one_source_stand_on_one_side(tmp_path):
    pairs = [{"text": f"sentence {n}", "target": f"Satz {n}", "id": f"p{n}"} for n in range(40)]
    pairs += [{"text": "Name", "target": "Name", "id": "a"}, {"text": "Name", "target": "Bezeichnung", "id": "b"}]
    pairs += [{"text": "All slides", "target": "Alle Folien", "id": "c"},
              {"text": "All Slides:", "target": "Alle Folien:", "id": "d"}]  # fmt: skip
    made_, removed = made(tmp_path, "pairs", pairs, fields=("text", "target"))
    # Pairs that differ in case and punctuation are one; another translation is another pair.
    assert [(r["id"], r["kept"]) for r in removed] == [("c", "d")]
    assert made_["train"]["documents"] + made_["validation"]["documents"] == 43
    spec = DataSpec(fields=("text", "target"), packing="whole")
    sides = {held_out(spec, Document(i, "Name", {"target": target}), False) for i, target in (("a", "1"), ("b", "2"))}
    assert len(sides) == 1


def test_the_picture_shows_no_peaks_that_are_not_there():
    for shortest, longest in ((1, 1), (1, 300), (2000, 45_000), (7, 157_271)):
        edges = report.bins(shortest, longest)
        widths = [after - before for before, after in zip(edges, edges[1:])]
        assert edges[0] == shortest and edges[-1] > longest and len(edges) < 80
        assert widths == sorted(widths) and widths[0] >= 1
