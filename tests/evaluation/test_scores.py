"""Scores over a validation set: the same on any number of devices and in any batch size, every example once."""

import json
import subprocess
import sys

import numpy as np
import pytest

from llm import models, sharding
from llm.data import ObjectiveSpec, Preparation, prepare
from llm.data.spec import CleanSpec, DataSpec, DedupSpec
from llm.evaluation.scores import Scorer
from llm.evaluation.spec import EvaluationSpec
from llm.tokenization.spec import TokenizerSpec
from tests.helpers import ROOT, environment

PROGRAM = """
import json, pathlib, sys
import flax.linen as nn, jax, optax
from llm import models, sharding
from llm.data import ObjectiveSpec, Preparation, prepare
from llm.data.spec import CleanSpec, DataSpec, DedupSpec
from llm.evaluation.scores import Scorer
from llm.evaluation.spec import EvaluationSpec
from llm.sharding import MeshSpec
from llm.tokenization.spec import TokenizerSpec
from llm.training.state import Recipe, create

folder, devices, batch_size = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
mesh_spec = MeshSpec(cpu_devices=devices)
sharding.request_cpu_devices(mesh_spec)
mesh = sharding.make_mesh(mesh_spec)
found = {}
for kind in ("classification", "causal"):
    labelled = kind == "classification"
    data = DataSpec(train=str(folder / "texts.jsonl"), label="label" if labelled else "", packing="whole",
                    row_length=16, buckets=(8, 16), validation_fraction=0.4)
    preparation = Preparation(data, CleanSpec(), DedupSpec(), TokenizerSpec(kind="wordpiece", vocab_size=80),
                              ObjectiveSpec(kind=kind))
    prepared = prepare(preparation, folder / f"{kind}-{devices}-{batch_size}", say=lambda *_: None, quiet=True)
    vocab = prepared.tokenizer.vocab_size
    spec = (models.BertSpec(context=16, layers=1, width=8, heads=2, attention="reference") if labelled
            else models.GPTSpec(context=16, layers=1, width=8, heads=2, attention="reference"))
    model = models.build(spec, vocab, len(prepared.labels))
    with jax.set_mesh(mesh):
        params = create(Recipe(model, optax.identity(), kind), mesh).params
        scores = Scorer(model, kind, prepared, EvaluationSpec(batch_size=batch_size), None, mesh).scores(params)
    found[kind] = {"numbers": scores.numbers, "records": len(scores.records), "rows": len(prepared.validation)}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    rng, words = np.random.default_rng(0), "one two three four five six seven".split()
    with (folder / "texts.jsonl").open("w") as file:
        for n in range(60):
            text = " ".join(words[i] for i in rng.integers(0, 7, rng.integers(1, 12)))
            file.write(json.dumps({"id": str(n), "text": f"{text} {n}", "label": "abc"[n % 3]}) + "\n")
    return folder


def run(texts, devices, batch_size):
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(texts), str(devices), str(batch_size)],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_scores_are_those_of_one_device_and_another_batch_size(texts):
    one, many = run(texts, 1, 7), run(texts, 8, 4)
    for kind, expected in one.items():
        got = many[kind]
        assert got["rows"] == expected["rows"]
        np.testing.assert_allclose(got["numbers"]["loss"], expected["numbers"]["loss"], rtol=1e-5)
    labelled = one["classification"]
    assert labelled["records"] == labelled["rows"] == labelled["numbers"]["examples"] > 7
    assert many["classification"]["numbers"]["confusion"] == labelled["numbers"]["confusion"]
    assert np.sum(labelled["numbers"]["confusion"]) == labelled["rows"]
    assert many["causal"]["numbers"]["tokens"] == one["causal"]["numbers"]["tokens"]


def test_the_best_of_a_questions_windows_answers_it(tmp_path):
    """A long text is read in windows, across batches; the highest score of all of them is the one answer."""
    texts = {
        "first": ["best"] + ["so"] * 30 + ["good"],
        "last": ["good"] + ["so"] * 30 + ["best"],
        "short": ["good", "so"],
        "nowhere": ["so"] * 40,
    }
    with (tmp_path / "texts.jsonl").open("w") as file:
        for name, words in texts.items():
            text = " ".join(words)
            answer = {"text": "best", "start": text.index("best")} if "best" in words else None
            file.write(json.dumps({"id": name, "question": f"which {name}", "text": text, "answer": answer}) + "\n")
    learned = {"question": "which", "text": "so good is the best", "answer": None}
    (tmp_path / "learned.jsonl").write_text(json.dumps(learned) + "\n")
    data = DataSpec(
        train=str(tmp_path / "learned.jsonl"), validation=str(tmp_path / "texts.jsonl"), fields=("question", "text"),
        answer="answer", packing="whole", row_length=20,
    )  # fmt: skip
    preparation = Preparation(
        data, CleanSpec(), DedupSpec(), TokenizerSpec(kind="wordpiece", vocab_size=80), ObjectiveSpec("span_qa")
    )
    prepared = prepare(preparation, tmp_path / "run", say=lambda *_: None, quiet=True)
    good, best = (prepared.tokenizer.encode(word)[0] for word in ("good", "best"))

    def score(params, batch):
        """Logits of both ends: 2 for "good", 3 for "best", 1 for no answer."""
        tokens_BT = np.asarray(batch["tokens"])
        logits_BT = 2.0 * (tokens_BT == good) + 3.0 * (tokens_BT == best)
        logits_BT[:, 0] = 1.0
        return logits_BT, logits_BT

    model = models.build(models.BertSpec(context=20, layers=1, width=8, heads=2), prepared.tokenizer.vocab_size, 0)
    mesh = sharding.make_mesh(sharding.MeshSpec())
    found = []
    for batch_size in (1, 3, 16):
        scorer = Scorer(model, "span_qa", prepared, EvaluationSpec(batch_size=batch_size), None, mesh)
        scorer._heads["spans"] = score
        found.append(scorer._answers(None))
    assert found[0].numbers == found[1].numbers == found[2].numbers
    by_answer = [(r["answer"], r["prediction"], r["windows"] > 1) for r in found[0].records]
    assert by_answer == [("best", "best", True), ("best", "best", True), ("", "good", False), ("", "", True)]
    assert found[0].numbers["exact_match"] == 0.75
