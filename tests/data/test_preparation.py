"""llm.prepare as a user launches it: what it leaves and says, and that nothing but input and settings decides it."""

import gzip
import hashlib
import json
import os
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest

from llm.data import Preparation, open_prepared
from llm.data.loader import sequential
from llm.data.sources import read_all
from llm.data.spec import DataSpec
from tests.helpers import ROOT, assert_refused, assert_refused_last, command, environment, verb

FOOTER = "Copyright by the example company, all rights reserved."
MAIL = "someone@example.com"


@pytest.fixture(scope="module")
def pile(tmp_path_factory):
    """Six compressed files, a unit each, of real prose, with a defect of every kind among it."""
    folder = tmp_path_factory.mktemp("pile")
    text = read_all(DataSpec(), "austen")[2].text
    pieces = [text[n * 1500 : (n + 1) * 1500] for n in range(120)]
    question = pieces[50][300:420]
    for file in range(6):
        records = [{"id": f"d{n}", "text": pieces[n] + "\n" + FOOTER, "n": n} for n in range(file, 120, 6)]
        if file == 0:
            records += [
                {"id": "exact", "text": pieces[7].replace(",", " -") + "\n" + FOOTER},
                {"id": "near", "text": pieces[8][:-25] + " a few other words"},
                {
                    "id": "german",
                    "text": "Dies ist ein deutscher Text über das Wetter und die Leute in der Stadt. " * 20,
                },
                {"id": "empty", "text": " \n\x00 "},
                {"id": "mail", "text": f"Write to {MAIL} about it. " + text[200_000:201_500]},
                {"id": "mojibake", "text": "The cafÃ© was full of people that day. " + text[202_000:203_500]},
            ]
        lines = [json.dumps(record).encode() for record in records]
        with gzip.open(folder / f"part{file}.jsonl.gz", "wb") as out:
            out.write(b"\n".join(lines) + b"\n")
    (folder / "questions").mkdir()
    (folder / "questions" / "q.txt").write_text(question)
    return folder


def flags(pile, *more):
    return [
        f"--input={pile}/*.gz", "--config.tokenizer.vocab_size=400", "--config.data.row_length=32",
        "--config.dedup.near=true", "--config.dedup.corpus_lines=20", "--config.clean.languages=en",
        "--config.clean.personal_data=email", f"--config.dedup.contamination={pile / 'questions'}",
        "--config.dedup.document_lines=true", "--config.data.unit_bytes=20000", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def prepared(pile, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("prepared")
    result = verb("prepare", *flags(pile), f"--workdir={workdir}", "--workers=1")
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    assert len(list((workdir / "data").glob("*.train.tokens"))) >= 4  # units enough to be dealt out
    return workdir, result


def contents(workdir):
    """Every file of the prepared data but the picture, hashed."""
    files = [*(workdir / "data").iterdir(), workdir / "tokenizer.json"]
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files if p.suffix != ".png"}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_is_left_and_why(prepared):
    workdir, result = prepared
    report = json.loads((workdir / "data" / "report.json").read_text())
    stages = {stage["stage"]: stage for stage in report["stages"]}
    assert list(stages) == [
        "read", "clean", "language", "personal data", "repeated lines", "contamination", "exact duplicates",
        "near duplicates", "lines of many documents",
    ]  # fmt: skip
    removed = {record["id"]: record for record in lines(workdir / "data" / "removed.jsonl")}
    assert removed["german"]["reason"] == "language: de" and removed["empty"]["stage"] == "clean"
    twins = {removed.get(i, {}).get("kept") for i in ("exact", "d7")}
    assert twins & {"exact", "d7"} and len({"exact", "d7"} & set(removed)) == 1
    (gone,) = {"near", "d8"} & set(removed)
    assert removed[gone]["kept"] in {"near", "d8"} and 0.8 <= removed[gone]["similarity"] < 1
    assert removed["d50"]["stage"] == "contamination" and "'q'" in removed["d50"]["detail"]
    assert set(removed) == {"german", "empty", gone, "d50", *({"exact", "d7"} & set(removed))}
    assert stages["lines of many documents"]["changed"]["line of many documents"][0] >= 117
    assert stages["personal data"]["changed"]["email"][:2] == [1, 1]
    assert MAIL not in (workdir / "data" / "report.md").read_text()
    prepared_ = open_prepared(workdir)
    text = "".join(
        prepared_.tokenizer.decode(row[weight > 0])
        for split in (prepared_.train, prepared_.validation)
        for batch in sequential(split, 64)
        for row, weight in zip(batch["tokens"], batch["weights"])
    )
    assert MAIL not in text and "<EMAIL>" in text and "café was full" in text and FOOTER not in text
    assert "documents" in result.stdout and str(workdir / "data" / "report.md") in result.stdout
    assert {p.name for p in (workdir / "data").iterdir() if "tokens" not in p.name} == {
        "report.json", "report.md", "lengths.png", "removed.jsonl", "skipped.jsonl", "train.rows.npz",
        "validation.rows.npz",
    }  # fmt: skip


def test_the_accounts_balance(prepared):
    workdir, _ = prepared
    report = json.loads((workdir / "data" / "report.json").read_text())
    documents, characters = 126, None
    for stage in report["stages"]:
        gone = [entry[:2] for entry in stage["dropped"].values()]
        assert stage["documents_in"] == documents
        assert characters in (None, stage["characters_in"])
        documents, characters = stage["documents_out"], stage["characters_out"]
        assert stage["documents_in"] - sum(d for d, _ in gone) == documents
        assert all(len(entry[2]) <= 10 for kind in ("dropped", "changed") for entry in stage[kind].values())
    splits = report["train"], report["validation"]
    assert sum(s["documents"] for s in splits) == documents == 126 - len(lines(workdir / "data" / "removed.jsonl"))
    assert sum(s["characters"] for s in splits) == characters
    found = open_prepared(workdir)
    for split, account in zip((found.train, found.validation), splits):
        assert split.text_bytes == account["bytes"]
        weights = sum(batch["weights"].sum() for batch in sequential(split, 64))
        assert weights == account["tokens"] == account["text_tokens"] + account["documents"]


def test_the_report_is_readable_and_the_picture_is_one(prepared):
    workdir, _ = prepared
    text = (workdir / "data" / "report.md").read_text()
    assert "| near duplicates |" in text and "![Lengths of documents in tokens](lengths.png)" in text
    assert (workdir / "data" / "lengths.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "how, hashseed",
    [
        pytest.param(["--workers=2"], "1", marks=pytest.mark.long),
        (["--executor=datatrove", "--tasks=1", "--workers=1"], "2"),
        pytest.param(["--executor=datatrove", "--tasks=4", "--workers=2"], "3", marks=pytest.mark.slow),
    ],
    ids=["two workers", "one task", "four tasks"],
)
def test_neither_workers_nor_tasks_nor_hash_seeds_change_a_byte(prepared, pile, tmp_path, how, hashseed):
    result = verb("prepare", *flags(pile), f"--workdir={tmp_path / 'run'}", *how, PYTHONHASHSEED=hashseed)
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    assert contents(tmp_path / "run") == contents(prepared[0])


@pytest.mark.long
def test_the_order_of_files_changes_no_decision(prepared, pile, tmp_path):
    folder = tmp_path / "pile"
    (folder / "questions").mkdir(parents=True)
    for number in range(6):  # the same files under names that sort the other way round
        (folder / f"part{5 - number}.jsonl.gz").write_bytes((pile / f"part{number}.jsonl.gz").read_bytes())
    (folder / "questions" / "q.txt").write_bytes((pile / "questions" / "q.txt").read_bytes())
    result = verb("prepare", *flags(folder), f"--workdir={tmp_path / 'run'}")
    assert result.returncode == 0, result.stderr
    key = ("id", "stage", "reason", "kept", "similarity")
    before, after = (lines(workdir / "data" / "removed.jsonl") for workdir in (prepared[0], tmp_path / "run"))
    assert {tuple(r.get(k) for k in key) for r in before} == {tuple(r.get(k) for k in key) for r in after}


@pytest.mark.long
def test_a_killed_preparation_goes_on_and_ends_the_same(prepared, pile, tmp_path):
    workdir = tmp_path / "run"
    arguments = [*flags(pile), f"--workdir={workdir}"]
    stops = (("documents", signal.SIGKILL, -9, 1), ("decide", signal.SIGTERM, 75, 2), ("encode", signal.SIGTERM, 75, 1))
    for phase, number, code, workers in stops:
        first = "all" if phase == "decide" else "00000"
        with subprocess.Popen(
            command("prepare", *arguments, f"--workers={workers}"), cwd=ROOT, env=environment(),
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        ) as process:  # fmt: skip
            deadline = time.time() + 120
            while not (workdir / "data.partial" / f"{first}.{phase}.json").is_file():
                assert process.poll() is None and time.time() < deadline
                time.sleep(0.001)
            process.send_signal(number)
            _, stderr = process.communicate(timeout=60)
        if process.returncode == 0:
            pytest.skip("the machine was too fast to stop it in time")
        assert process.returncode == code and "Traceback" not in stderr, stderr
        assert not (workdir / "data").exists()
    shutil.copytree(workdir, tmp_path / "other")
    changed = verb("prepare", *flags(pile, "--config.dedup.threshold=0.9"), f"--workdir={tmp_path / 'other'}")
    assert changed.returncode == 0, changed.stderr
    assert "dedup.threshold: 0.8 -> 0.9" in changed.stdout and "starting anew" in changed.stdout
    result = verb("prepare", *arguments)
    assert result.returncode == 0 and "going on with" in result.stdout, result.stderr
    assert contents(workdir) == contents(prepared[0])
    assert not (workdir / "data.partial").exists()


def test_a_finished_preparation_is_never_half_replaced(prepared, pile):
    workdir, _ = prepared
    before = contents(workdir)
    again = verb("prepare", *flags(pile), f"--workdir={workdir}")
    assert again.returncode == 0 and "prepared before" in again.stdout
    for changed in ("--config.dedup.near=false", "--config.data.row_length=64"):
        assert_refused(verb("prepare", *flags(pile, changed), f"--workdir={workdir}"), changed[9:].split("=")[0], "->")
    assert contents(workdir) == before


def test_an_edit_that_keeps_the_size_is_noticed(tmp_path):
    (tmp_path / "a.txt").write_text("some words of a text that is long enough\n" * 40)
    arguments = [f"--input={tmp_path / 'a.txt'}", f"--workdir={tmp_path / 'run'}", "--config.data.split_by=tail",
                 "--config.data.row_length=16"]  # fmt: skip
    result = verb("prepare", *arguments)
    assert result.returncode == 0, result.stderr
    (tmp_path / "a.txt").write_text("some words of a text that is long enuogh\n" * 40)
    assert_refused(verb("prepare", *arguments), "a.txt has changed")


def test_records_that_cannot_be_read(tmp_path):
    good = [json.dumps({"text": f"a good record, number {n}, of several words"}) for n in range(40)]
    bad = [*good[:3], "{broken", *good[3:], '{"txt": 1}']
    (tmp_path / "a.jsonl").write_text("\n".join(bad))
    arguments = [f"--input={tmp_path / 'a.jsonl'}", "--config.data.row_length=16"]
    assert_refused(verb("prepare", *arguments, f"--workdir={tmp_path / 'stop'}"), "a.jsonl:4", "JSON")
    for tasks in (1, 2):  # datatrove's own words go to its logs
        how = ["--executor=datatrove", f"--tasks={tasks}", f"--workers={tasks}"]
        assert_refused(verb("prepare", *arguments, f"--workdir={tmp_path / 'tasks'}", *how), "a.jsonl:4", "JSON")
    # what was stopped goes on when told to skip
    result = verb("prepare", *arguments, f"--workdir={tmp_path / 'stop'}", "--on-error=skip")
    assert result.returncode == 0 and "2 records skipped" in result.stdout, result.stderr
    assert "going on with" in result.stdout
    skipped = lines(tmp_path / "stop" / "data" / "skipped.jsonl")
    assert [s["where"].rsplit(":", 1)[1] for s in skipped] == ["4", "42"] and skipped[0]["record"].strip() == "{broken"
    report = json.loads((tmp_path / "stop" / "data" / "report.json").read_text())
    assert report["skipped"] == 2 and report["stages"][0]["documents_in"] == 40


@pytest.mark.long
def test_labelled_data(tmp_path):
    rows = [(f"text number {n} of the good kind", "good") for n in range(30)] + [
        (f"bad text {n}", "bad") for n in range(20)
    ]
    for name, part in (("train", rows), ("test", rows[:2] + [("another good text", "good")])):
        body = "body,kind\n" + "".join(f'"{text}",{label}\n' for text, label in part)
        (tmp_path / f"{name}.csv").write_text(body)
    arguments = [
        f"--config.data.train={tmp_path / 'train.csv'}", f"--config.data.validation={tmp_path / 'test.csv'}",
        "--config.data.text=body", "--config.data.label=kind", "--config.data.packing=whole",
        "--config.data.row_length=32", "--config.data.buckets=16,32", "--config.objective.kind=classification",
        "--config.tokenizer.kind=wordpiece", "--config.tokenizer.vocab_size=300", f"--workdir={tmp_path / 'run'}",
    ]  # fmt: skip
    result = verb("prepare", *arguments)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "run" / "data" / "report.json").read_text())
    assert report["labels"] == ["bad", "good"]
    # the test set stays whole, and its texts leave training
    assert report["validation"]["documents"] == 3 and report["train"]["documents"] == 48
    found = open_prepared(tmp_path / "run", _objective("classification"))
    labels = np.concatenate([b["labels"][b["weights"] > 0] for b in sequential(found.train, 8)])
    assert (labels == 1).sum() == 28 and (labels == 0).sum() == 20
    (tmp_path / "test.csv").write_text("body,kind\nsome text,unheard\n")
    arguments[-1] = f"--workdir={tmp_path / 'other'}"
    assert_refused_last(verb("prepare", *arguments), "'unheard'", "does not stand in training")


def _objective(kind):
    from llm.data import ObjectiveSpec

    return ObjectiveSpec(kind=kind)


def test_pairs(tmp_path):
    pairs = [{"text": f"sentence number {n}", "target": f"Satz Nummer {n}"} for n in range(60)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(p) for p in pairs))
    result = verb(
        "prepare", f"--input={tmp_path / 'a.jsonl'}", f"--workdir={tmp_path / 'run'}",
        "--config.data.fields=text,target", "--config.data.packing=whole", "--config.data.row_length=32",
        "--config.objective.kind=seq2seq",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    found = open_prepared(tmp_path / "run", _objective("seq2seq"))
    seen = set()
    for split in (found.train, found.validation):
        for batch in sequential(split, 8):
            for source, target, weight in zip(batch["source_tokens"], batch["targets"], batch["weights"]):
                if weight.sum():
                    ids = [int(i) for i in target[weight > 0]]
                    assert ids[-1] == found.tokenizer.end_of_text
                    text = found.tokenizer.decode([int(i) for i in source if i != found.tokenizer.end_of_text])
                    seen.add((text, found.tokenizer.decode(ids[:-1])))
    assert seen == {(p["text"], p["target"]) for p in pairs}


FAKE_SLURM = """#!{python}
# What sbatch does, on this machine: run the array's tasks one after another, and print a job's number.
import os, re, subprocess, sys
script = [a for a in sys.argv[1:] if not a.startswith("-")][-1]
found = re.search(r"--array=(\\d+)-(\\d+)", open(script).read())
for task in range(int(found[1]), int(found[2]) + 1) if found else [0]:
    env = {{**os.environ, "SLURM_ARRAY_TASK_ID": str(task), "SLURM_JOB_ID": "1", "RUN_OFFSET": "0"}}
    done = subprocess.run(["bash", script], env=env, capture_output=True, text=True)
    print(done.stdout, done.stderr, file=sys.stderr)
print("Submitted batch job 1")
"""


@pytest.mark.long
def test_slurm_runs_the_same_stages(prepared, pile, tmp_path):
    """datatrove's Slurm executor, with an sbatch that runs the jobs at once."""
    import sys

    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "sbatch").write_text(FAKE_SLURM.format(python=sys.executable))
    (tools / "srun").write_text(
        '#!/bin/bash\nwhile [[ $1 == -* ]]; do [[ $1 == -n ]] && shift; shift; done\nexec "$@"\n'
    )
    (tools / "merge_stats").write_text("#!/bin/bash\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    arguments = [
        *flags(pile),
        f"--workdir={tmp_path / 'run'}",
        "--executor=slurm",
        "--slurm-partition=cpu",
        "--tasks=3",
    ]
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    result = verb("prepare", *arguments, PATH=path)
    assert result.returncode == 0 and "Slurm has the tasks" in result.stdout, result.stderr
    shown = verb("prepare", *flags(pile), f"--workdir={tmp_path / 'run'}")
    assert shown.returncode == 0, shown.stderr
    assert contents(tmp_path / "run") == contents(prepared[0])
    assert_refused(
        verb("prepare", *arguments[:-2], f"--workdir={tmp_path / 'x'}", "--executor=slurm"), "--slurm-partition"
    )


def test_a_mixture_of_prepared_folders_is_trained_on(tmp_path, corpus):
    from tests.helpers import tiny

    token = ["--config.tokenizer.vocab_size=300", "--config.data.row_length=32", "--config.data.split_by=tail"]
    first = verb("prepare", f"--input={corpus}", f"--workdir={tmp_path / 'a'}", *token)
    assert first.returncode == 0, first.stderr
    same = [f"--config.tokenizer.path={tmp_path / 'a' / 'tokenizer.json'}", *token[1:]]
    (tmp_path / "b.txt").write_text((corpus / "part3.txt").read_text()[::-1])
    second = verb("prepare", f"--input={tmp_path / 'b.txt'}", f"--workdir={tmp_path / 'b'}", *same)
    assert second.returncode == 0, second.stderr
    prepared = f"data.prepared={tmp_path / 'a'},{tmp_path / 'b'}"
    arguments = tiny(
        corpus, tmp_path / "run", prepared, "data.weights=0.75,0.25", "data.holdout=()", "training.steps=6"
    )
    result = verb("train", *arguments)
    assert result.returncode == 0 and "a mixture of 2 prepared folders" in result.stdout, result.stderr
    assert verb("evaluate", f"--workdir={tmp_path / 'run'}").returncode == 0
    other = tiny(corpus, tmp_path / "run2", f"data.prepared={tmp_path / 'none'}", "data.holdout=()")
    assert_refused(verb("train", *other), "holds no prepared data")


def test_packaged_corpora_are_listed_with_size_and_licence():
    result = verb("prepare", "--list")
    assert result.returncode == 0 and "[" not in result.stdout, result.stderr
    found = {line.split()[0]: line for line in result.stdout.splitlines()}
    assert {"austen", "sotu", "r8/train", "web_sentences"} <= set(found)
    assert "233 documents, 10.8 M characters; CC0-1.0" in found["sotu"]


def test_a_corpus_config_is_not_trained(tmp_path):
    result = verb("train", "--config=experiments/corpora/austen.py", f"--workdir={tmp_path / 'run'}")
    assert_refused(result, "no model to train", "llm.prepare")


def test_settings_have_one_home():
    assert set(Preparation().to_json()) == {"data", "clean", "dedup", "tokenizer"}


@pytest.mark.parametrize(
    "flags, part",
    [
        (["--config.objective.kind=masked"], "the tokenizer has no mask token"),
        (["--config.objective.kind=classification"], "data.packing='whole'"),
        (["--config.objective.kind=classification", "--config.data.packing=whole"], "needs labels"),
        (["--config.objective.kind=span_corruption"], "sentinels"),
        (["--config.objective.kind=span_qa", "--config.data.packing=whole"], "data.answer"),
        (["--config.data.fields=text,target"], "data.packing='whole'"),
        (["--config.data.packing=loose"], "concatenate, best_fit, whole"),
        (["--config.data.buckets=64,32"], "data.packing='whole'"),
        (["--config.clean.languages=english"], "'english'"),
        (["--config.clean.quality=gopher"], "gopher_quality"),
        (["--config.clean.words=nowhere.txt"], "there is no such file"),
        (["--config.tokenizer.path=nowhere.json"], "nowhere.json"),
        (["--config.dedup.contamination=nowhere"], "nowhere"),
        (["--executor=lsf"], "local, datatrove, slurm, ray"),
        (["--tasks=2"], "--executor"),
        (["--slurm-partition=cpu"], "need each other"),
        (["--config.seed=1"], "there is no field 'seed'"),
        (["--workers=0"], "--workers=0"),
        (["--on-error=ignore"], "--on-error"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_anything_is_read(tmp_path, corpus, flags, part):
    result = verb("prepare", f"--input={corpus}", f"--workdir={tmp_path / 'run'}", *flags)
    assert_refused(result, part)
    assert not (tmp_path / "run" / "data").exists()


def test_questions_without_the_answers_that_were_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"q": "Why?", "text": "Because it is so."}\n')
    result = verb(
        "prepare", f"--input={tmp_path / 'a.jsonl'}", f"--workdir={tmp_path / 'run'}", "--config.data.answer=reply",
        "--config.data.fields=q,text", "--config.data.packing=whole", "--config.objective.kind=span_qa",
    )  # fmt: skip
    assert_refused(result, "a.jsonl:1", "there is no 'reply'", "data.answer names it")


def test_one_word_documents_held_out_by_tail(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"unbrokenword{n}"}) + "\n" for n in range(60)))
    result = verb("prepare", f"--input={tmp_path / 'a.jsonl'}", f"--workdir={tmp_path / 'run'}",
                  "--config.data.split_by=tail", "--config.data.row_length=16")  # fmt: skip
    assert result.returncode in (0, 2) and "balance" not in result.stderr and "Traceback" not in result.stderr


def test_questions(tmp_path):
    """A long text becomes windows; the answer is found again after cleaning moved it."""
    text = (
        "\ufeff"
        + "The river is long and the town is old.  \r\n" * 3
        + "It was founded by the Romans in the year 50.\n" * 4
    )
    records = [
        {"id": f"q{n}", "question": f"Who founded town {n}?", "text": f"{text} {n}",
         "answer": {"text": "the Romans", "start": text.index("the Romans")}}
        for n in range(30)
    ] + [{"id": "none", "question": "Why?", "text": "Nobody knows it at all.", "answer": None},
         {"id": "bad", "question": "Who?", "text": "Me.", "answer": {"text": "elsewhere", "start": 0}}]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(r) for r in records))
    result = verb(
        "prepare", f"--input={tmp_path / 'a.jsonl'}", f"--workdir={tmp_path / 'run'}", "--config.data.answer=answer",
        "--config.data.fields=question,text", "--config.data.packing=whole", "--config.data.row_length=64",
        "--config.objective.kind=span_qa", "--config.tokenizer.kind=wordpiece", "--config.tokenizer.vocab_size=120",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert [r["reason"] for r in lines(tmp_path / "run" / "data" / "removed.jsonl")] == ["answer is not in the text"]
    found = open_prepared(tmp_path / "run", _objective("span_qa"))
    answers, rows = [], 0
    for split in (found.train, found.validation):
        for batch in sequential(split, 8):
            for tokens, start, end, weight in zip(batch["tokens"], batch["starts"], batch["ends"], batch["weights"]):
                rows += weight > 0
                if weight and start:
                    answers.append(found.tokenizer.decode([int(i) for i in tokens[start : end + 1]]).strip())
    assert rows > 60 and len(answers) >= 30 and set(answers) == {"the Romans"}
