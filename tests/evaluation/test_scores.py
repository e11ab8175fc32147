"""Scores over a validation set: the same on any number of devices and in any batch size, every example once."""

import json
import subprocess
import sys

import numpy as np
import pytest

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
