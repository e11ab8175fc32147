"""Every bad input of the verbs: one clear line, exit code 2, nothing lost. Launched as a user launches them."""

import contextlib
import json
import os
import subprocess
import time

import pytest

from llm.cli import VERBS
from tests.helpers import (
    ROOT,
    assert_refused,
    assert_refused_last,
    command,
    environment,
    launch,
    tiny,
    verb,
    write_corpus,
)

QUICK = "--config=experiments/quickstart.py:smoke"


@pytest.mark.parametrize(
    "flags, parts",
    [
        (["--config.optimizer.learnig_rate=1"], ["learnig_rate", "'learning_rate' (nearest)"]),
        (["--config.model.layers=2.5"], ["--config.model.layers=2.5", "expected an integer"]),
        (["--config.model.layers"], ["expected a value"]),
        (["--confg.model.layers=2"], ["unknown argument '--confg.model.layers=2'"]),
        (["extra"], ["unknown argument 'extra'"]),
        (["--config.model.heads=3"], ["model.heads=3 does not divide model.width=64"]),
        (["--config.model.attention=flash"], ["model.attention='flash'", "blockwise"]),
        (["--config.mesh.data=3"], ["data=3", "does not fit 1 devices"]),
        (["--config.training.batch_size=3", "--config.mesh.cpu_devices=2"], ["batch_size=3 is not a multiple"]),
        (
            ["--config.data.row_length=66", "--config.mesh.cpu_devices=2", "--config.mesh.context=2"],
            ["data.row_length=66 is not a multiple of 4", "mesh.context=2"],
        ),
        (["--config.data.prefixes=(a,b)"], ["data.prefixes=('a', 'b'): 2 texts for 1 sources"]),
        (["--config.data.train=nowhere"], ["there is no corpus 'nowhere'", "austen"]),
    ],
)
def test_wrong_overrides(flags, parts, tmp_path):
    assert_refused(verb("train", QUICK, f"--workdir={tmp_path / 'run'}", *flags), *parts)
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize(
    "flags, parts",
    [
        (["--config.model.vocab_size=100"], ["model.vocab_size=100 is smaller than the tokenizer's 512"]),
        (["--config.model.attention=cudnn"], ["attention: cudnn", "model.attention='auto'"]),
        (["--config.data.holdout=emmma"], ["data.holdout names 'emmma'", "emma"]),
    ],
)
def test_wrong_overrides_that_only_the_data_show(flags, parts, tmp_path):
    assert_refused_last(verb("train", QUICK, f"--workdir={tmp_path / 'run'}", *flags), *parts)
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_mesh_that_does_not_divide_the_model(tmp_path):
    flags = ["--config.mesh.cpu_devices=8", "--config.mesh.tensor=8"]
    result = verb("train", QUICK, f"--workdir={tmp_path / 'run'}", *flags)
    assert_refused_last(result, "heads axis", "8 parts of tensor")
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.long
def test_a_refused_command_leaves_the_workdir_free_for_the_right_one(corpus, tmp_path):
    wrong = tiny(corpus, tmp_path / "run", "data.holdout=(prat7,)")
    assert_refused(verb("train", *wrong), "prat7")
    result = verb("train", *tiny(corpus, tmp_path / "run", "training.steps=6"))
    assert result.returncode == 0, result.stderr


def test_missing_flags_and_no_config(tmp_path):
    assert_refused(verb("train", f"--workdir={tmp_path}"), "--config")
    assert_refused(verb("train", QUICK), "--workdir")
    assert_refused(verb("train", QUICK, "--workdir="), "--workdir is empty")
    assert_refused(verb("train", QUICK, "--workdir=" + "x" * 300), "cannot be written")
    assert_refused(verb("train", "--config=" + "x" * 300, f"--workdir={tmp_path}"), "--config=xxx")
    assert_refused(verb("evaluate", "--workdir=x", "--batch=3"), "--batch=3")


@pytest.mark.parametrize(
    "text, parts",
    [
        (None, ["there is no file"]),
        ("x = 1\n", ["defines no get_config(variant)"]),
        ("def get_config(variant):\n    return 1 / 0\n", [":2:", "ZeroDivisionError"]),
        ("def get_config(variant:\n", ["SyntaxError"]),
        ("import sys\nsys.exit(0)\n", [":2:", "SystemExit"]),
        (
            "from ml_collections import ConfigDict\ndef get_config(variant=''):\n"
            "    return ConfigDict({'family': 'gpt'})\n",
            ["seed is missing"],
        ),
        ("def get_config(variant=''):\n    return 3\n", ["returned int, expected a ConfigDict"]),
        (
            "from llm.config import default_config\ndef get_config(variant=''):\n    c = default_config('gpt')\n"
            "    c.model.widht = 3\n    return c\n",
            [":4:", "widht", "width"],
        ),
    ],
)
def test_wrong_config_files(text, parts, tmp_path):
    path = tmp_path / "mine.py"
    if text is not None:
        path.write_text(text)
    assert_refused(verb("train", f"--config={path}", f"--workdir={tmp_path / 'run'}"), str(path), *parts)
    assert not (tmp_path / "run").exists()


def test_unknown_variant(tmp_path):
    assert_refused(
        verb("train", "--config=experiments/quickstart.py:smok", f"--workdir={tmp_path / 'run'}"),
        "unknown variant 'smok'", "'smoke' (nearest)",
    )  # fmt: skip


def prepare(source, workdir, *flags):
    return verb("prepare", f"--input={source}", f"--workdir={workdir}", *flags)


def test_wrong_corpora(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    assert_refused(prepare(folder, tmp_path / "run"), str(folder), "the corpus is empty")
    (folder / "a.txt").write_text(" \n\n")
    assert_refused(prepare(folder, tmp_path / "run"), "the corpus is empty")
    (folder / "a.txt").write_text("only one document")
    assert_refused(prepare(folder, tmp_path / "run"), "data.split_by=tail")
    (folder / "a.txt").write_text("a short line\n" * 3)
    assert_refused(
        prepare(folder, tmp_path / "run", "--config.data.split_by=tail"), "fewer than one row", "data.row_length=128"
    )
    (folder / "b.txt").write_bytes(b"good text \xff bad")
    assert_refused(prepare(folder, tmp_path / "run"), str(folder / "b.txt"), "0xff", "offset 10")
    (folder / "b.txt").write_bytes(b"\xef\xbb\xbfgood \xff bad")
    assert_refused(prepare(folder, tmp_path / "run"), "offset 8")
    (folder / "b.txt").unlink()
    (folder / "c.jsonl").write_text('{"text": "fine"}\n{"txt": "not"}\n')
    assert_refused(prepare(folder, tmp_path / "run"), "c.jsonl:2", "there is no 'text'", "data.text")
    (folder / "c.jsonl").write_text('{"text": "fine"}\n{broken\n')
    assert_refused(prepare(folder, tmp_path / "run"), "c.jsonl:2", "not JSON")
    (folder / "c.jsonl").write_text(json.dumps({"text": "a lone \ud800 surrogate"}) + "\n")
    assert_refused(prepare(folder, tmp_path / "run", "--config.data.split_by=tail"), "lone surrogate U+D800")
    assert_refused(prepare(tmp_path / "a.pdf", tmp_path / "run"), "there is no corpus")
    assert not (tmp_path / "run" / "data").exists()


def test_a_validation_text_that_stands_in_training(tmp_path):
    folder = write_corpus(tmp_path)
    (folder / "part7.txt").write_text((folder / "part2.txt").read_text() + "\n\n")  # equal once cleaned
    result = verb("train", *tiny(folder, tmp_path / "run", "dedup.exact=false"))
    assert_refused(result, "'part7'", "'part2'", "one text in training and validation")


def test_workdirs_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("precious")
    assert_refused(verb("train", QUICK, f"--workdir={tmp_path / 'file'}"), "is a file, expected a folder")
    assert (tmp_path / "file").read_text() == "precious"
    assert_refused(verb("train", QUICK, f"--workdir={tmp_path / 'file' / 'run'}"), "cannot be written")
    assert_refused(verb("train", QUICK, "--workdir=/proc/run"), "cannot be written")
    for name in ("evaluate", "generate"):
        more = ["--prompt=x"] if name == "generate" else []
        assert_refused(verb(name, f"--workdir={tmp_path / 'none'}", *more), "there is no such folder")
        assert_refused(verb(name, f"--workdir={tmp_path}", *more), "is not a run's folder")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of a given number of megabytes."""
    mounted = []

    def mount(megabytes):
        folder = tmp_path / f"disk{megabytes}"
        folder.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], capture_output=True
        )
        if done.returncode:
            pytest.skip("a small file system cannot be mounted here (needs root)")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=False)


def test_disk_full_before_a_run(small_disk, corpus):
    disk = small_disk(1)
    (disk / "ballast").write_bytes(bytes(disk_free(disk)))
    assert_refused(verb("train", *tiny(corpus, disk / "run")), "cannot be written", "the disk is full")

    disk = small_disk(2)
    (disk / "ballast").write_bytes(bytes(disk_free(disk) - 700_000))
    refused = verb("train", *tiny(corpus, disk / "run"))
    assert_refused_last(refused, "MB free", "make room")


@pytest.mark.long
def test_disk_that_fills_up_during_a_run(small_disk, corpus):
    """Room at the start, none later: one line, what was saved stays, and the same command goes on."""
    disk = small_disk(8)
    # Checkpoints 200 steps apart, log rows every two: the disk fills between two saves.
    arguments = tiny(corpus, disk / "run", "training.steps=400", "training.checkpoint_every=200")
    with subprocess.Popen(
        command("train", *arguments), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True,
    ) as process:  # fmt: skip
        deadline = time.time() + 120
        while not list((disk / "run" / "checkpoints").glob("200/manifest.json")):
            assert process.poll() is None and time.time() < deadline
            time.sleep(0.002)
        with (disk / "ballast").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        try:
            _, stderr = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 2 and "Traceback" not in stderr, stderr
    assert "disk is full" in stderr.splitlines()[-1], stderr
    (disk / "ballast").unlink()
    result = verb("train", *arguments)
    assert result.returncode == 0 and "resuming at step 200" in result.stdout, result.stderr
    steps = [json.loads(line)["step"] for line in (disk / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(2, 401, 2))


def test_disk_that_fills_up_during_a_preparation(small_disk, tmp_path):
    disk, source = small_disk(12), tmp_path / "a.jsonl"
    with source.open("w") as file:
        for n in range(6000):
            words = " ".join(f"word{(n * k) % 977}" for k in range(1, 60))
            file.write(json.dumps({"text": f"{n} {words}"}) + "\n")
    (disk / "ballast").write_bytes(bytes(disk_free(disk) - 3_000_000))
    refused = prepare(source, disk / "run")
    assert_refused_last(refused, "disk is full", "make room")
    assert not (disk / "run" / "data").exists()
    (disk / "ballast").unlink()
    result = prepare(source, disk / "run")
    assert result.returncode == 0 and "going on with" in result.stdout, result.stderr
    assert prepare(source, tmp_path / "run").returncode == 0
    reports = [json.loads((run / "data" / "report.json").read_text()) for run in (disk / "run", tmp_path / "run")]
    assert reports[0] == reports[1]


def disk_free(folder):
    numbers = os.statvfs(folder)
    return numbers.f_bavail * numbers.f_frsize


@pytest.mark.parametrize(
    "flags, parts",
    [
        (["--prompt="], ["--prompt is empty"]),
        (["--prompt=" + "word " * 60], ["context is 48", "shorten the prompt"]),
        (["--prompt=She", "--max-tokens=100"], ["exceed the model's context of 48", "at most"]),
        (["--prompt=She", "--max-tokens=0"], ["--max-tokens=0"]),
        (["--prompt=She", "--temperature=-1"], ["temperature=-1.0"]),
        (["--prompt=She", "--top-p=1.5"], ["top_p=1.5"]),
        (["--prompt=She", "--top-k=-2"], ["top_k=-2"]),
        (["--prompt=She", "--top-k=many"], ["--top-k", "many"]),
    ],
)
def test_wrong_generation(finished_run, flags, parts):
    assert_refused(verb("generate", f"--workdir={finished_run}", *flags), *parts)


def test_prompts_of_a_config_that_are_too_long(corpus, tmp_path):
    long = "word " * 60
    assert_refused(
        verb("train", *tiny(corpus, tmp_path / "run", f"generation.prompts=({long},)")), "generation.prompts", "context"
    )


def test_prepared_data_of_other_settings(tmp_path, corpus):
    first = prepare(corpus, tmp_path / "run")
    assert first.returncode == 0, first.stderr
    again = prepare(corpus, tmp_path / "run")
    assert again.returncode == 0 and "prepared before" in again.stdout
    refused = prepare(corpus, tmp_path / "run", "--config.tokenizer.vocab_size=500")
    assert_refused(refused, "tokenizer.vocab_size: 4096 -> 500")


def test_changed_sources_of_prepared_data(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    write_corpus(folder)
    assert prepare(folder, tmp_path / "run").returncode == 0
    (folder / "new.txt").write_text("one more document")
    assert_refused(prepare(folder, tmp_path / "run"), str(folder), "has changed", "name another workdir")


def test_a_validation_source_that_cleans_to_nothing(tmp_path, corpus):
    (tmp_path / "empty.txt").write_bytes(b"\x01\x02\x03")
    refused = prepare(corpus, tmp_path / "run", f"--config.data.validation={tmp_path / 'empty.txt'}")
    assert_refused_last(refused, "empty.txt", "no validation text is left after cleaning")


@pytest.mark.parametrize("name", VERBS)
def test_help_is_short_and_exits_0(name):
    result = launch(name, "--help")
    assert result.returncode == 0 and result.stderr == ""
    assert len(result.stdout.splitlines()) < 40 and f"python -m llm.{name}" in result.stdout


def test_the_index_lists_every_verb():
    result = subprocess.run([*command("train")[:2], "llm"], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert result.returncode == 0
    for name in VERBS:
        assert f"llm.{name} " in result.stdout
