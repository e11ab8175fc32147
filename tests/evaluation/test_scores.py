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
import dataclasses, json, pathlib, sys
import flax.linen as nn, jax, numpy as np, optax
from llm import models, sharding
from llm.data import ObjectiveSpec, Preparation, prepare
from llm.data.spec import CleanSpec, DataSpec, DedupSpec
from llm.evaluation.scores import Scorer
from llm.evaluation.spec import EvaluationSpec
from llm.sharding import MeshSpec
from llm.tokenization.spec import TokenizerSpec
from llm.training.state import Recipe

folder, devices, batch_size = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
mesh_spec = MeshSpec(cpu_devices=devices)
sharding.request_cpu_devices(mesh_spec)
mesh = sharding.make_mesh(mesh_spec)
found = {}
small = dict(layers=1, width=8, heads=2, attention="reference")
pairs, cased = {"fields": ("text", "target")}, TokenizerSpec(kind="wordpiece", vocab_size=80)
kinds = {
    "classification": (models.BertSpec(context=16, **small), {"label": "label"}),
    "causal": (models.GPTSpec(context=16, **small), {}),
    "masked": (models.BertSpec(context=16, **small), {}),
    "span_corruption": (models.T5Spec(head_width=4, **small), {}),
    "continuation": (models.T5Spec(head_width=4, **small), {}),
    "seq2seq": (models.EncDecSpec(tied=False, **small), pairs),
    "contrastive": (models.BertSpec(context=16, **small), pairs),
}
for kind, (spec, fields) in kinds.items():
    packing = {} if kind in ("causal", "continuation") else {"packing": "whole"}
    buckets = {"buckets": (8, 16)} if kind == "classification" else {}
    data = DataSpec(train=str(folder / "texts.jsonl"), row_length=16, validation_fraction=0.4, **packing, **buckets,
                    **fields)
    tokenizer = dataclasses.replace(cased, sentinels=8 * (kind == "span_corruption"))
    preparation = Preparation(data, CleanSpec(), DedupSpec(), tokenizer, ObjectiveSpec(kind=kind))
    prepared = prepare(preparation, folder / kind, say=lambda *_: None, quiet=True)
    model = models.build(spec, prepared.tokenizer.vocab_size, len(prepared.labels))
    with jax.set_mesh(mesh):
        # Drawn by numpy: compiling what initialises seven models takes longer than all of the rest.
        rng, shapes = np.random.default_rng(0), nn.unbox(Recipe(model, optax.identity(), kind).boxed().params)
        params = jax.tree_util.tree_map_with_path(
            lambda path, x: np.float32(rng.normal(path[-1].key == "scale", 0.1 if x.ndim < 3 else 1, x.shape)), shapes
        )
        scores = Scorer(model, kind, prepared, EvaluationSpec(batch_size=batch_size), None, mesh).scores(params)
    found[kind] = {"numbers": scores.numbers, "records": scores.records, "rows": len(prepared.validation)}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    rng, words = np.random.default_rng(0), "one two three four five six seven".split()
    with (folder / "texts.jsonl").open("w") as file:
        for n in range(60):
            text = " ".join(words[i] for i in rng.integers(0, 7, rng.integers(1, 12)))
            file.write(json.dumps({"id": str(n), "text": f"{text} {n}", "label": "abc"[n % 3],
                                   "target": text[::-1]}) + "\n")  # fmt: skip
    return folder


def run(texts, devices, batch_size):
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(texts), str(devices), str(batch_size)],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def assert_near(got, expected):
    """Equal texts and counts, near numbers, all the way down."""
    assert type(got) is type(expected)
    if isinstance(expected, dict):
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            assert_near(got[name], value)
    elif isinstance(expected, list):
        assert len(got) == len(expected)
        for one, value in zip(got, expected):
            assert_near(one, value)
    elif isinstance(expected, float):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=2e-5)
    else:
        assert got == expected


@pytest.mark.long
def test_scores_and_records_are_those_of_one_device_and_another_batch_size(texts):
    one, many = run(texts, 1, 7), run(texts, 8, 4)
    assert_near(many, one)
    for kind, found in one.items():
        numbers, records = found["numbers"], found["records"]
        # The last batches of both are filled up with rows that are nobody's.
        assert len(records) == found["rows"] > 7 and found["rows"] % 7 and found["rows"] % 8, kind
        assert [record["example"] for record in records] == list(range(found["rows"])), kind
        if kind in ("causal", "continuation", "masked", "span_corruption"):
            tokens = np.array([record["tokens"] for record in records])
            losses = np.array([record["loss"] for record in records])
            assert tokens.sum() == numbers["tokens"] and len(set(losses)) > len(losses) / 2, kind
            np.testing.assert_allclose((losses * tokens).sum() / tokens.sum(), numbers["loss"], rtol=1e-6)
            low, high = numbers["perplexity_interval"]
            assert low < numbers["perplexity"] < high
    assert len({record["hypothesis"] for record in one["seq2seq"]["records"]}) > 1  # there is something to compare
    labelled = one["classification"]["numbers"]
    assert np.sum(labelled["confusion"]) == one["classification"]["rows"] == labelled["examples"]


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
