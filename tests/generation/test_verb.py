"""`llm.generate` as a user launches it, on a small run whose tokens are bytes and whose tokenizer can chat."""

import json
import pathlib
import re
import signal
import subprocess
import time

import pytest

from llm import sharding
from llm.errors import InputError
from llm.generate import main
from llm.tokenization import Tokenizer, TokenizerSpec, train, training
from tests.helpers import ROOT, assert_refused, command, environment, tiny, verb

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<|turn|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory, corpus) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("bytes")
    spec = TokenizerSpec(kind="bytes", vocab_size=258, special_tokens=("<|turn|>",))
    document = json.loads(train(spec, ["a"])._text)
    document["model"]["llm"] = {"chat_template": TEMPLATE}
    Tokenizer(training.to_text(document)).save(folder / "tokenizer.json")
    settings = [f"tokenizer.path={folder}/tokenizer.json", "training.steps=20", "model.context=160", "model.width=16"]
    settings += ["model.layers=1"]
    result = verb("train", *tiny(corpus, folder / "run", *settings))
    assert result.returncode == 0, result.stderr
    return folder / "run"


@pytest.fixture
def written(run, capsys, monkeypatch):
    """What the verb prints, by its main in this process: programs are compiled once for all tests."""
    # The number of devices is set before the first use of JAX, which has been.
    monkeypatch.setattr(sharding, "request_cpu_devices", lambda mesh: None)

    def call(*flags: str) -> str:
        capsys.readouterr()
        main([f"--workdir={run}", *flags])
        return capsys.readouterr().out

    return call


def test_a_prompt_its_stop_string_and_guesses(run, written):
    how = ["--prompt=She was", "--max-tokens=40", "--temperature=0", "--repetition-penalty=1.3", "--no-repeat-ngram=4"]
    launched = verb("generate", f"--workdir={run}", *how)
    text = written(*how)
    assert launched.returncode == 0 and launched.stdout == text, launched.stderr
    assert text.startswith("She was") and len(text) > 20
    own = text.removeprefix("She was")
    stop = own[10:13]
    assert written(*how, f"--stop={stop}") == "She was" + own[: own.index(stop)] + "\n"
    assert written(*how, "--lookup") == text
    assert written(*how, f"--draft={run}") == text
    assert written(*how, "--no-cache") == text


def test_log_probabilities_and_bias(written):
    bias = [
        "--logit-bias=101:50",
        "--logit-bias=1:60",
        "--min-tokens=3",
    ]  # an id, and the turn's end, which ends no text
    lines = written("--prompt=He", "--max-tokens=5", "--log-probabilities", *bias).splitlines()
    assert len(lines) == 6 and all(float(line.split()[0]) < 0 for line in lines[1:])
    assert lines[1].split()[1] == "'<|turn|>'" and lines[0] == "He" + 5 * "<|turn|>"


def test_beams(written):
    how = ["--prompt=She", "--max-tokens=12"]
    assert written(*how, "--beams=1") == written(*how, "--temperature=0")


def chat(run, said, *flags):
    how = dict(cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    return subprocess.run(command("generate", f"--workdir={run}", "--chat", *flags), input=said, **how)


def test_a_chat_answers_turn_by_turn_and_stops_at_its_end(run):
    """What matches is drawn: three letters, and then the token that ends a turn."""
    tokenizer = Tokenizer.load(run / "tokenizer.json")
    end = tokenizer.end_of_turn
    assert end == tokenizer.special_tokens["<|turn|>"]
    flags = ["--regex=[a-p]{3,9}", f"--logit-bias={end}:200", "--max-tokens=9", "--temperature=0"]
    result = chat(run, "Who?\n\nWhy?\n", *flags)
    assert result.returncode == 0, result.stderr
    first, second, rest = result.stdout.split("\n")
    assert len(first) == len(second) == 3 and first.isalpha() and second.isalpha() and rest == ""
    # The second turn is answered as the end of the whole conversation.
    history = f"user: Who?<|turn|>assistant: {first}<|turn|>user: Why?<|turn|>assistant: "
    want = tokenizer.encode(history, allow_special=True)
    messages = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": first},
                {"role": "user", "content": "Why?"}]  # fmt: skip
    assert tokenizer.chat(messages) == want
    # Turns that fit alone and not together.
    both = chat(run, f"{'Who? ' * 18}\n{'Why? ' * 18}\n", *flags)
    assert_refused(both, "the conversation has grown too long", "context is 160")
    assert len(both.stdout.split()) == 1


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    lines = [{"prompt": "She " * (1 + n % 5), "id": n, "source": "é"} for n in range(33)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.long
def test_a_file_of_prompts_that_is_stopped_ends_byte_equal(run, written, prompts, tmp_path):
    flags = [f"--workdir={run}", f"--prompts={prompts}", "--batch-size=2", "--max-tokens=40", "--log-probabilities"]
    whole, again = tmp_path / "whole.jsonl", tmp_path / "again.jsonl"
    first = verb("generate", *flags, f"--output={whole}")
    assert first.returncode == 0 and "33 answers" in first.stdout, first.stderr
    answers = [json.loads(line) for line in whole.read_text().splitlines()]
    assert [a["id"] for a in answers] == list(range(33)) and answers[0]["source"] == "é"
    assert all(len(a["tokens"]) == len(a["log_probabilities"]) <= 40 for a in answers)
    process = subprocess.Popen(command("generate", *flags, f"--output={again}"), cwd=ROOT, env=environment(),
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip
    partial, deadline = again.with_name("again.jsonl.partial"), time.time() + 200
    while process.poll() is None and time.time() < deadline:
        if partial.exists() and partial.read_bytes().count(b"\n") > 4:
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75 and "the same command goes on" in errors, errors
    assert not again.exists()
    with partial.open("ab") as file:
        file.write(b'{"prompt": "cut of')
    with pytest.raises(InputError, match="again.jsonl.partial was begun with other prompts"):
        written(*flags[1:], f"--output={again}", "--seed=1")
    result = verb("generate", *flags, f"--output={again}")
    assert result.returncode == 0 and "answering: 100%" in result.stderr, result.stderr
    assert again.read_bytes() == whole.read_bytes()
    # A line is what its prompt alone gives with its own seed.
    alone = written(f"--prompt={answers[7]['prompt']}", "--seed=7", "--max-tokens=40")
    assert alone == answers[7]["prompt"] + answers[7]["completion"] + "\n"
    with pytest.raises(InputError, match="is there already"):
        written(*flags[1:], f"--output={again}")


def test_a_short_last_batch_compiles_nothing(written, tmp_path):
    from llm.generation.engine import _cached_step

    sizes = []
    for count in (2, 3):
        path = tmp_path / f"{count}.jsonl"
        path.write_text('{"prompt": "She"}\n' * count)
        written(f"--prompts={path}", f"--output={path}.out", "--batch-size=2", "--max-tokens=3", "--min-p=0.5")
        sizes.append(_cached_step._cache_size())
    assert sizes[0] == sizes[1]


def test_examples_before_the_prompt(run, written, tmp_path):
    shots, prompts, out = tmp_path / "shots.jsonl", tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    shots.write_text('{"input": "one", "output": "1"}\n{"input": "two", "output": "2"}\n')
    prompts.write_text('{"prompt": "three"}\n')
    how = [f"--few-shot={shots}", "--temperature=0", "--max-tokens=6"]
    newline = Tokenizer.load(run / "tokenizer.json").encode("\n")[0]
    assert written("--prompt=three", *how, f"--logit-bias={newline}:1000") == "\n"
    shown = written("--prompt=three", *how)
    written(f"--prompts={prompts}", f"--output={out}", *how)
    assert json.loads(out.read_text())["completion"] == shown.strip()
    plain = "Input: one\nOutput: 1\n\nInput: two\nOutput: 2\n\nInput: three\nOutput:"
    assert written(f"--prompt={plain}", "--stop=\n", *how[1:]) == plain + shown


def test_text_that_matches(run, written, tmp_path):
    schema, prompts, out = tmp_path / "schema.json", tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    members = {"name": {"type": "string", "maxLength": 4}, "kind": {"enum": ["x", 7, None]}}
    schema.write_text(json.dumps({"type": "object", "properties": members, "required": ["kind"],
                                  "additionalProperties": False}))  # fmt: skip
    prompts.write_text('{"prompt": "She"}\n{"prompt": "He was"}\n')
    files = [f"--prompts={prompts}", f"--output={out}", "--batch-size=1", f"--json-schema={schema}"]
    written(*files, "--max-tokens=80", "--temperature=3")
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    for answer in answers:
        value = json.loads(answer["completion"])
        assert answer["ended"] == "end" and value.keys() <= members.keys() and value["kind"] in ("x", 7, None)
        assert len(value.get("name", "")) <= 4
    assert len(answers) == 2
    how = ["--prompt=She", "--max-tokens=80", r"--regex=(19|20)\d\d[a-z]{4,9}!"]
    for more in (
        ["--temperature=3"],
        ["--temperature=3", "--lookup"],
        ["--temperature=3", f"--draft={run}"],
        ["--beams=3"],
    ):
        text = written(*how, *more)
        assert re.fullmatch(r"She(19|20)\d\d[a-z]{4,9}!\n", text), text
    with pytest.raises(InputError, match="no token of the vocabulary can begin a match"):
        written("--prompt=She", r"--regex=[^\s\S]")
    # A changed schema does not go on with what was begun by another.
    (tmp_path / "out.jsonl").rename(tmp_path / "out.jsonl.partial")
    schema.write_text("true")
    with pytest.raises(InputError, match="begun with other prompts"):
        written(*files, "--max-tokens=80", "--temperature=3")


def test_files_that_are_no_schema(tmp_path):
    for data, message in [(b"\xff", "not UTF-8 at byte 0"), (b"{", "not JSON"), (b"[]", "an object or boolean")]:
        (tmp_path / "s").write_bytes(data)
        with pytest.raises(InputError, match=f"--json-schema=.*: .*{message}"):
            main(["--workdir=nowhere", "--prompt=x", f"--json-schema={tmp_path / 's'}"])
    assert_refused(verb("generate", "--workdir=nowhere", "--prompt=x", "--regex=("), "--regex=(: unclosed group")


def test_a_refusal_is_one_line(run, written, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "x"}\n{"prompt": "%s"}\n' % ("x" * 200))
    flags = [f"--workdir={run}", f"--prompts={path}", f"--output={tmp_path / 'o'}"]
    assert_refused(verb("generate", *flags), f"{path}:2: the prompt has 201 tokens", "context is 160")
    with pytest.raises(InputError, match="the id 999: the vocabulary has 258"):
        written("--prompt=x", "--logit-bias=999:1")


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "expected one of --prompt, --prompts and --chat, got none"),
        (["--chat", "--prompts=p"], "got --prompts and --chat"),
        (["--prompts=p"], "--prompts and --output go together"),
        (["--prompt=x", "--output=o"], "--prompts and --output go together"),
        (["--prompt=x", "--batch-size=2"], "--batch-size is of --prompts"),
        (["--prompts=p", "--output=o", "--batch-size=0"], "--batch-size=0 must be at least 1"),
        (["--prompt=x", "--beams=0"], "--beams=0"),
        (["--prompt=x", "--beams=2", "--top-k=3"], "--beams draws nothing"),
        (["--prompt=x", "--beams=2", "--stop=x"], "--beams and --stop do not go together"),
        (["--chat", "--beams=2"], "--beams and --chat"),
        (["--chat", "--few-shot=x"], "--chat and --few-shot"),
        (["--prompt=x", "--draft=x", "--lookup"], "--draft and --lookup"),
        (["--prompt=x", "--lookup", "--no-cache"], "--lookup and --no-cache"),
        (["--prompt=x", "--length-penalty=1"], "--length-penalty is of --beams"),
        (["--prompt=x", "--stop="], "--stop is empty"),
        (["--prompt=x", "--temperature=-1"], "temperature=-1"),
        (["--prompt=x", "--top-p=1.1"], "top_p=1.1"),
        (["--prompt=x", "--min-p=2"], "min_p=2"),
        (["--prompt=x", "--repetition-penalty=0"], "repetition_penalty=0"),
        (["--prompt=x", "--logit-bias=a:1"], "--logit-bias=a:1: expected ID:X"),
        (["--prompt=x", "--logit-bias=3"], "expected ID:X"),
        (["--prompt=x", "--min-tokens=5", "--max-tokens=4"], "--min-tokens=5 is more than --max-tokens=4"),
        (["--prompt=x", "--seed=-1"], "--seed=-1"),
        (["--prompts=nowhere", "--output=o"], "--prompts=nowhere: No such file"),
        (["--prompt=x", "--regex=("], r"--regex=\(: unclosed group"),
        (["--prompt=x", "--json-schema=nowhere"], "--json-schema=nowhere: No such file"),
        (["--prompt=x", "--regex=a", "--json-schema=nowhere"], "--regex and --json-schema do not go together"),
        (["--prompt=x", "--few-shot=nowhere"], "--few-shot=nowhere: No such file"),
    ],
)
def test_flags_that_do_not_fit_are_refused_before_anything_is_opened(flags, message):
    with pytest.raises(InputError, match=message):
        main(["--workdir=nowhere", *flags])
