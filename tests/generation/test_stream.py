"""Text as it comes: never a broken character, never part of a stop string, however it is cut."""

import json

import numpy as np
import pytest

from llm.errors import InputError
from llm.generation.prompt_file import AnswerFile, few_shot, read_lines
from llm.generation.stream import TextStream
from llm.tokenization import StreamDecoder, TokenizerSpec, train

BYTES = train(TokenizerSpec(kind="bytes", vocab_size=257), ["a"])


class Pieces:
    """A decoder whose tokens are places in a list of texts."""

    def __init__(self, pieces):
        self.pieces = pieces

    def push(self, token):
        return self.pieces[token]

    def flush(self):
        return ""


def streamed(pieces, stops):
    stream = TextStream(Pieces(pieces), stops)
    shown = [stream.push(n) for n in range(len(pieces))] + [stream.flush()]
    assert "".join(shown) == stream.text
    return stream.text, stream.stopped


def oracle(text, stops):
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


def test_stop_strings_however_the_text_is_cut():
    rng = np.random.default_rng(0)
    for _ in range(400):
        text = "".join(rng.choice(list("ab\n"), 12))
        stops = ["".join(rng.choice(list("ab\n"), n)) for n in rng.integers(1, 5, rng.integers(0, 4))]
        cuts = [0, *sorted(rng.integers(0, 13, 5)), 12]
        pieces = [text[a:b] for a, b in zip(cuts, cuts[1:])]
        assert streamed(pieces, stops) == oracle(text, stops), (text, stops, pieces)


def test_what_may_begin_a_stop_string_is_held_back_and_no_more():
    stream = TextStream(Pieces(["xa", "b", "c", "aab", "d!"]), ["abd!"])
    assert [stream.push(n) for n in range(5)] == ["x", "", "abc", "a", ""]
    assert stream.stopped and stream.flush() == "" and stream.text == "xabca"


def test_no_broken_character_with_a_token_a_byte():
    text = "né \U0001f468\u200d\U0001f469\u200d\U0001f466 火!"
    stream = TextStream(StreamDecoder(BYTES), ["火!"])
    shown = [stream.push(token) for token in BYTES.encode(text)]
    assert "\ufffd" not in "".join(shown) and "".join(shown) == text[:-2] and stream.stopped
    assert all(piece == "" or piece.encode() for piece in shown) and shown[1] == ""


def write(path, *lines):
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.mark.parametrize(
    "line, message",
    [
        ("{not json\n", "p.jsonl:3: not JSON"),
        ("[1]\n", "p.jsonl:3: expected an object with prompt"),
        ({"text": "x"}, '"prompt" must be a text'),
        ({"prompt": ""}, "must be a text that is not empty"),
        ({"prompt": 3}, "got 3"),
        ({"prompt": "x", "completion": "y"}, "rename it"),
        ('{"prompt": "\\ud800"}\n', "p.jsonl:3: holds a lone surrogate"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = write(tmp_path / "p.jsonl", {"prompt": "a"}, "\n", line)
    with pytest.raises(InputError, match=message):
        read_lines(path, "--prompts", ("prompt",), ("completion",))


def test_files_that_cannot_be_read(tmp_path):
    for path, message in [
        ("nowhere", "No such file"),
        (tmp_path, "directory"),
        (write(tmp_path / "e", "\n"), "no line"),
    ]:
        with pytest.raises(InputError, match=f"--prompts=.*{message}"):
            read_lines(str(path), "--prompts", ("prompt",))
    (tmp_path / "b").write_bytes(b"\xff")
    with pytest.raises(InputError, match="not UTF-8 at byte 0"):
        read_lines(str(tmp_path / "b"), "--prompts", ("prompt",))


def test_examples_stand_before_the_prompt():
    got = few_shot([{"input": "1", "output": "one"}, {"input": "2", "output": "two"}], "3")
    assert got == "Input: 1\nOutput: one\n\nInput: 2\nOutput: two\n\nInput: 3\nOutput:"


def test_answers_go_on_after_the_last_whole_batch(tmp_path):
    path, answers = str(tmp_path / "out.jsonl"), [{"n": n, "text": "é"} for n in range(5)]
    file = AnswerFile(path, "this", 2)
    file.add(answers[:2])
    file.add(answers[2:4])
    partial = tmp_path / "out.jsonl.partial"
    whole = partial.read_bytes()
    for cut, done in [(whole, 4), (whole + b'{"n": 4}\n', 4), (whole[:-1], 2), (whole[:-20], 2), (whole[:70], 0)]:
        partial.write_bytes(cut)
        assert AnswerFile(path, "this", 2).done == done
    partial.write_bytes(whole + b"{")
    file = AnswerFile(path, "this", 2)
    file.add(answers[4:])
    with pytest.raises(InputError, match="begun with other prompts"):
        AnswerFile(path, "that", 2)
    file.finish()
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == answers
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.jsonl"]
    with pytest.raises(InputError, match="is there already"):
        AnswerFile(path, "this", 2)
    with pytest.raises(InputError, match="cannot be written"):
        AnswerFile(str(tmp_path / "no" / "out"), "this", 2)
