"""`llm.convert` as a user runs it: in, tried, written, evaluated, fine-tuned, out again."""

import json
import pickle
import re
import shutil
from unittest import mock

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llm import convert, sharding, weights
from llm.data import ObjectiveSpec, open_prepared
from llm.data.loader import sequential
from llm.run_folder import open_run
from llm.tokenization import Tokenizer
from llm.weights import writing
from tests.helpers import assert_refused, long_but, verb
from tests.weights.checkpoints import GOLDENS
from tests.weights.test_sources import Code, write_gguf

# As Hugging Face's tokenizers say that a token stands before every text.
TEMPLATE = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}]}


def prepared(corpus, folder, *tokenizer):
    flags = ("--config.data.row_length=32", "--config.data.split_by=tail", *tokenizer)
    result = verb("prepare", f"--input={corpus}", f"--workdir={folder}", *flags)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def tokens(tmp_path_factory, corpus):
    """A folder with a tokenizer of bytes and a few special tokens; the goldens have places for all of them."""
    how = "--config.tokenizer.kind=bytes", "--config.tokenizer.special_tokens=<a>,<b>,<c>"
    return prepared(corpus, tmp_path_factory.mktemp("tokens") / "bytes", *how)


@pytest.fixture(scope="module")
def data(tmp_path_factory, corpus, run):
    """A corpus prepared by the tokenizer of the imported run."""
    how = f"--config.tokenizer.path={run / 'tokenizer.json'}"
    return prepared(corpus, tmp_path_factory.mktemp("data") / "data", how)


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokens):
    """The golden Llama as a run."""
    workdir = tmp_path_factory.mktemp("runs") / "llama"
    given = f"--from={GOLDENS / 'llama'}", f"--tokenizer={tokens}"
    result = verb("convert", *given, f"--workdir={workdir}", "--prompt=Hi")
    assert result.returncode == 0, result.stderr
    for part in ("12,304 in 21 tensors", "writes", "perplexity", "tokens/s"):
        assert part in result.stdout, result.stdout
    return workdir


def test_what_came_in_generates_and_evaluates(run, data):
    said = json.loads((run / "imported.json").read_text())
    assert said["model_type"] == "llama" and said["from"].endswith("llama")
    text = verb("generate", f"--workdir={run}", "--prompt=Hello", "--temperature=0", "--max-tokens=5")
    assert text.returncode == 0 and text.stdout.startswith("Hello"), text.stderr
    assert_refused(verb("evaluate", f"--workdir={run}"), "imported and has no data", "--data=FOLDER")
    scores = verb("evaluate", f"--workdir={run}", f"--data={data}")
    assert scores.returncode == 0 and "bits per byte" in scores.stdout, scores.stderr


@pytest.mark.long
def test_it_is_fine_tuned_from_its_own_config(run, data, tmp_path):
    tuned = tmp_path / "tuned"
    result = verb(
        "train", f"--config={run / 'config.json'}", f"--workdir={tuned}", f"--config.data.prepared={data}",
        "--config.training.steps=30", "--config.training.validate_every=30", "--config.optimizer.learning_rate=1e-2",
        "--config.optimizer.warmup_steps=2", "--config.data.row_length=32",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert f"starting from {run}, step 0: 12 of 12 parameter arrays" in result.stdout
    before = verb("evaluate", f"--workdir={run}", f"--data={data}").stdout
    loss = float(before.split("loss")[1].split()[0])
    assert json.loads((tuned / "summary.json").read_text())["validation"]["loss"] < loss - 1


def test_out_and_in_again_is_bit_equal(run, tmp_path):
    folder = tmp_path / "theirs"
    result = verb("convert", f"--to={folder}", f"--workdir={run}")
    assert result.returncode == 0 and "LlamaForCausalLM" in result.stdout, result.stderr
    written, first = load_file(folder / "model.safetensors"), load_file(GOLDENS / "llama" / "model.safetensors")
    assert written.keys() == first.keys()
    for name, x in first.items():
        np.testing.assert_array_equal(written[name], x, err_msg=name)
    again = verb("convert", f"--from={folder}", f"--workdir={tmp_path / 'again'}")
    assert again.returncode == 0, again.stderr
    read = [json.loads((w / "config.json").read_text()) for w in (run, tmp_path / "again")]
    assert read[0]["model"] == read[1]["model"] and read[0]["generation"] == read[1]["generation"]
    said = json.loads((folder / "tokenizer_config.json").read_text())
    assert said["add_bos_token"] is False and said["eos_token"]
    assert said["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert_refused(verb("convert", f"--to={folder}", f"--workdir={run}"), "is not empty")


@pytest.mark.parametrize("name", ["gpt2", "t5", "marian", "bert-bare"])
def test_other_families_go_out_and_come_in_again(tmp_path, tokens, monkeypatch, name):
    """Tokenizer and settings; GPT-2 in parts, with all its ends; what sentence-transformers reads.

    By the verb's functions, without the look at the model.
    """
    monkeypatch.setattr(sharding, "request_cpu_devices", lambda mesh: None)  # JAX has been used
    checkpoint, run, theirs, again = (tmp_path / part for part in ("checkpoint", "run", "theirs", "again"))
    shutil.copytree(GOLDENS / name, checkpoint)
    if name == "marian":
        shutil.copytree(GOLDENS.parent / name, checkpoint, dirs_exist_ok=True)
    ends = [256, 257] if name == "gpt2" else 256
    if name == "gpt2":
        said = json.loads((checkpoint / "config.json").read_text()) | {"eos_token_id": ends}
        (checkpoint / "config.json").write_text(json.dumps(said))
        monkeypatch.setattr(writing, "PART_BYTES", 9000)
    convert.take_in(str(checkpoint), str(run), None if name == "marian" else str(tokens))
    convert.main([f"--to={theirs}", f"--workdir={run}"])
    convert.take_in(str(theirs), str(again))

    tensors, first = weights.open_source(str(theirs)).tensors, load_file(checkpoint / "model.safetensors")
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(tensor.read(), first[key], err_msg=key)
    assert Tokenizer.load(run / "tokenizer.json").fingerprint == Tokenizer.load(again / "tokenizer.json").fingerprint
    one, two = (json.loads((folder / "config.json").read_text()) for folder in (run, again))
    assert one["model"] == two["model"] and one["generation"] == two["generation"]
    assert one["generation"]["ends"] == ([257] if name == "gpt2" else [])
    if name != "bert-bare":
        assert json.loads((theirs / "config.json").read_text())["eos_token_id"] == ends

    parts = sorted(path.name for path in theirs.glob("*.safetensors"))
    if name != "gpt2":
        assert parts == ["model.safetensors"]
    else:
        assert parts == [f"model-{n:05d}-of-{len(parts):05d}.safetensors" for n in range(1, len(parts) + 1)]
        index = json.loads((theirs / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(x.nbytes for x in first.values())
        for part in parts:
            held = load_file(theirs / part)
            assert sorted(held) == sorted(key for key, where in index["weight_map"].items() if where == part)
            assert len(held) == 1 or sum(x.nbytes for x in held.values()) <= 9000
    if name == "bert-bare":
        modules = json.loads((theirs / "modules.json").read_text())
        assert [module["type"].split(".")[-1] for module in modules] == ["Transformer", "Pooling", "Normalize"]
        assert all((theirs / module["path"]).is_dir() for module in modules)
        pooling = json.loads((theirs / "1_Pooling" / "config.json").read_text())
        assert pooling["word_embedding_dimension"] == 16
        assert [key for key, on in pooling.items() if on is True] == ["pooling_mode_mean_tokens"]


@pytest.mark.parametrize(
    "name",
    long_but(("gpt2", "t5"), ["gpt2", "bert-answers", "bert-classes", "bert-pretraining", "t5", "t5-v1.1", "marian"]),
)
def test_other_families_come_in(tmp_path, tokens, name):
    given = [f"--from={GOLDENS / name}", f"--tokenizer={tokens}"]
    if name == "marian":  # a folder as it is published, with its own tokenizer
        shutil.copytree(GOLDENS / name, tmp_path / name)
        shutil.copytree(GOLDENS.parent / name, tmp_path / name, dirs_exist_ok=True)
        tensors = load_file(tmp_path / name / "model.safetensors")
        tensors["final_logits_bias"][:, 258] = 1e3  # it would write nothing but padding
        save_file(tensors, tmp_path / name / "model.safetensors")
        given = [f"--from={tmp_path / name}", "--prompt=>> no code"]
    result = verb("convert", *given, f"--workdir={tmp_path / 'run'}")
    assert result.returncode == 0, result.stderr
    if name == "bert-classes":
        assert json.loads((tmp_path / "run" / "imported.json").read_text())["labels"] == ["good", "bad", "ugly"]
        assert_refused(verb("generate", f"--workdir={tmp_path / 'run'}", "--prompt=x"), "writes nothing")
        classes_are_tuned(tmp_path)
    else:
        assert ("writes" in result.stdout) == (not name.startswith("bert"))
    generation = json.loads((tmp_path / "run" / "config.json").read_text())["generation"]
    assert generation["banned"] == ([258] if name == "marian" else []) and generation["opening"] == ""
    if name == "marian":
        assert re.search(r"writes +'ein ein ein", result.stdout), result.stdout  # and not the padding
        given = f"--workdir={tmp_path / 'run'}", "--prompt=>> no code", "--max-tokens=12", "--temperature=0"
        assert " ".join(["ein"] * 12) in verb("generate", *given).stdout  # as transformers, tests/goldens/marian.json
        assert_refused(verb("generate", *given, "--logit-bias=258:5"), "names a token twice")
        translations_are_scored(tmp_path)


def classes_are_tuned(folder):
    rows = [{"text": f"{n}: {name}", "kind": name, "id": f"{name}{n}"} for name in ("good", "bad", "ugly")
            for n in range(8)]  # fmt: skip
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = verb(
        "train", f"--config={folder / 'run' / 'config.json'}", f"--workdir={folder / 'tuned'}",
        f"--config.data.train={folder / 'texts.jsonl'}", "--config.data.label=kind", "--config.data.packing=whole",
        "--config.data.validation_fraction=0.2", "--config.training.steps=2", "--config.training.batch_size=4",
        "--config.training.validate_every=2", "--config.optimizer.warmup_steps=1",
        "--config.optimizer.learning_rate=1e-9",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    count = re.search(r"step 0: (\d+) of (\d+) parameter arrays", result.stdout)
    assert count is not None and count[1] == count[2], result.stdout
    assert "accuracy" in json.loads((folder / "tuned" / "summary.json").read_text())["validation"]
    # The data has its classes in another order, and each has kept its own column.
    with mock.patch.object(sharding, "request_cpu_devices"):  # of this process they are settled
        old, new = (open_run(str(folder / name)) for name in ("run", "tuned"))
    assert old.labels != new.labels and sorted(old.labels) == sorted(new.labels)
    heads = [run.params["class_head"]["output"]["kernel"] for run in (old, new)]
    for name in old.labels:
        theirs, ours = (np.asarray(head)[:, run.labels.index(name)] for head, run in zip(heads, (old, new)))
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def translations_are_scored(folder):
    """Targets are cut by the target's model; padding is not written there either."""
    golden = json.loads((GOLDENS.parent / "marian.json").read_text())
    rows = [{"text": text, "target": text, "id": str(n)} for n, text in enumerate(golden["texts"]) if text.strip()]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = verb(
        "prepare", f"--input={folder / 'pairs.jsonl'}", f"--workdir={folder / 'data'}", "--config.data.row_length=64",
        "--config.data.fields=text,target", "--config.objective.kind=seq2seq", "--config.data.packing=whole",
        "--config.data.validation_fraction=0.5", f"--config.tokenizer.path={folder / 'run' / 'tokenizer.json'}",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    validation = open_prepared(folder / "data", ObjectiveSpec(kind="seq2seq")).validation
    pairs = {tuple(source): target for source, target in zip(golden["sources"], golden["targets"])}
    read = [(s[s != 256].tolist(), t[t != 256].tolist()) for batch in sequential(validation, 1)
            for s, t in zip(*(np.where(batch[f"{name}egments"] != 0, batch[key], 256)
                              for name, key in (("source_s", "source_tokens"), ("s", "targets"))))]  # fmt: skip
    assert read and all(pairs[tuple(source)] == target for source, target in read)
    result = verb("evaluate", f"--workdir={folder / 'run'}", f"--data={folder / 'data'}")
    assert result.returncode == 0, result.stderr
    written = dict(zip(map(tuple, golden["sources"]), golden["written"]))
    scored = [json.loads(line) for line in (folder / "run" / "validation.jsonl").read_text().splitlines()]
    for (source, _), record in zip(read, scored, strict=True):
        assert record["hypothesis"].startswith(written[tuple(source)]), record


def test_gguf_comes_in(tmp_path, tokens):
    path = write_gguf(tmp_path / "model.gguf")
    assert_refused(
        verb("convert", f"--from={path}", f"--workdir={tmp_path / 'run'}"), "no tokenizer", "--tokenizer=PATH"
    )
    result = verb("convert", f"--from={path}", f"--tokenizer={tokens}", f"--workdir={tmp_path / 'run'}")
    assert result.returncode == 0 and "12,304" in result.stdout, result.stderr


def test_nothing_is_prepared_or_trained_over_imported_weights(run, corpus):
    before = (run / "tokenizer.json").read_bytes()
    assert_refused(verb("prepare", f"--input={corpus}", f"--workdir={run}"), "holds imported weights")
    config = f"--config={run / 'config.json'}"
    assert_refused(verb("train", config, f"--workdir={run}"), "holds imported weights")
    assert (run / "tokenizer.json").read_bytes() == before
    try:
        (run / "tokenizer.json").write_bytes(before.replace(b"<c>", b"<d>"))
        assert_refused(verb("generate", f"--workdir={run}", "--prompt=a"), "not the tokenizer that the model was made")
    finally:
        (run / "tokenizer.json").write_bytes(before)


@pytest.mark.parametrize(
    "files, begins",
    [
        ({}, False),
        ({"tokenizer_config.json": {"add_bos_token": True}}, True),
        ({"tokenizer_config.json": {"add_bos_token": False}, "tokenizer.json": {"post_processor": TEMPLATE}}, False),
        ({"tokenizer_config.json": {}, "tokenizer.json": {"post_processor": TEMPLATE}}, True),
        ({"tokenizer.json": {"post_processor": {"processors": [{"type": "ByteLevel"}, TEMPLATE]}}}, True),
        ({"tokenizer.json": {"post_processor": {"type": "ByteLevel"}}}, False),
        ({"tokenizer.model": {}}, True),
    ],
)
def test_what_begins_a_text(tmp_path, files, begins):
    from llm.convert import _begins
    from llm.weights import Source

    for name, said in files.items():
        (tmp_path / name).write_text(json.dumps(said))
    source = Source(tmp_path / "elsewhere", {"model_type": "llama"}, {}, False, None)
    assert _begins(source, str(tmp_path)) is begins


@pytest.mark.parametrize("said, begins", [({}, True), ({"add_bos_token": False}, False)])
def test_what_begins_a_text_in_a_gguf(tmp_path, said, begins):
    import gguf

    from llm.convert import _begins
    from llm.weights import Source

    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tokenizer_model("llama")
    for name, value in said.items():
        writer.add_bool(f"tokenizer.ggml.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert _begins(Source(tmp_path / "x.gguf", {}, {}, True, tmp_path / "x.gguf"), None) is begins


def test_refusals_leave_no_run(tmp_path, tokens, run):
    checkpoint, workdir = tmp_path / "checkpoint", tmp_path / "run"
    shutil.copytree(GOLDENS / "gpt2", checkpoint)
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["transformer.h.1.ln_2.bias"]
    save_file(tensors, checkpoint / "model.safetensors")
    given = f"--from={checkpoint}", f"--workdir={workdir}"
    assert_refused(verb("convert", *given, f"--tokenizer={tokens}"), "lacks transformer.h.1.ln_2.bias")
    small = json.loads((checkpoint / "config.json").read_text()) | {"vocab_size": 100}
    (checkpoint / "config.json").write_text(json.dumps(small))
    assert_refused(verb("convert", *given, f"--tokenizer={tokens}"), "model.vocab_size=100", "ids would fall outside")
    assert not list(workdir.iterdir())
    assert_refused(verb("convert", f"--workdir={workdir}"), "--from", "--to")
    assert_refused(verb("convert", f"--from={checkpoint}", f"--to={checkpoint}", f"--workdir={workdir}"), "one of")
    shutil.copytree(GOLDENS / "gpt2", checkpoint, dirs_exist_ok=True)
    bias = tensors["transformer.h.1.ln_1.bias"].astype(np.int32)  # seen when its turn to be written comes
    tensors = load_file(checkpoint / "model.safetensors") | {"transformer.h.1.ln_1.bias": bias}
    save_file(tensors, checkpoint / "model.safetensors")
    assert_refused(verb("convert", *given, f"--tokenizer={tokens}"), "ln_1.bias: numbers of type I32")
    assert not list(workdir.iterdir())
    said = json.loads((GOLDENS / "gpt2" / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(said | {"model_type": "mamba"}))
    assert_refused(verb("convert", *given, f"--tokenizer={tokens}"), "model_type 'mamba'; there are gpt2")
    (checkpoint / "config.json").write_text(json.dumps(said))
    (checkpoint / "model.safetensors").write_bytes((GOLDENS / "gpt2" / "model.safetensors").read_bytes()[:-100])
    assert_refused(verb("convert", *given, f"--tokenizer={tokens}"), "model.safetensors is damaged")
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "pytorch_model.bin").write_bytes(pickle.dumps({"wte.weight": Code(tmp_path / "made")}))
    assert_refused(verb("convert", *given, f"--tokenizer={tokens}"), "mkdir, which is no tensor", "nothing of it was")
    assert not list(workdir.iterdir()) and not (tmp_path / "made").exists()
    golden = f"--from={GOLDENS / 'gpt2'}", f"--tokenizer={tokens}"
    assert_refused(verb("convert", *golden, f"--workdir={run}"), "holds a run already")
