"""Configs: overrides by type, hints, variants, and the round trip through config.json."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm import config, models
from llm.errors import InputError
from llm.training.optimizer import schedule
from tests.helpers import ROOT

FOUND = sorted(p for p in (ROOT / "experiments").rglob("*.py") if "def get_config" in p.read_text())
CORPORA = [p for p in FOUND if p.parent.name == "corpora"]
CONFIGS = [p for p in FOUND if p not in CORPORA]


def resolved(*assignments):
    return config.resolve(config.override(config.default_config("gpt"), list(assignments)))


@pytest.mark.parametrize(
    "path, text, value",
    [
        ("optimizer.learning_rate", "1", 1.0),
        ("optimizer.learning_rate", "3e-4", 3e-4),
        ("model.layers", "2", 2),
        ("model.qk_norm", "True", True),
        ("model.qk_norm", "false", False),
        ("data.train", "elsewhere", "elsewhere"),
        ("data.holdout", "(a,b,c)", ("a", "b", "c")),
        ("data.holdout", "a,b", ("a", "b")),
        ("generation.prompts", "('It was, he said',)", ("It was, he said",)),
        ("generation.prompts", '"My dear', ('"My dear',)),
        ("data.holdout", "()", ()),
        ("model.kv_heads", "2", 2),
        ("model.kv_heads", "None", None),
        ("optimizer.clip_norm", "none", None),
        ("training.loss_chunk", "64", 64),
        ("seed", "7", 7),
    ],
)
def test_overrides_take_the_type_of_the_field(path, text, value):
    found = resolved((path, text))
    for name in path.split("."):
        found = getattr(found, name)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "path, text, message",
    [
        ("model.layers", "2.5", "expected an integer"),
        ("model.layers", "1e3", "expected an integer"),
        ("model.layers", "None", "expected an integer"),
        ("model.qk_norm", "1", "expected true or false"),
        ("optimizer.learning_rate", "fast", "expected a number"),
        ("optimizer.learning_rate", "nan", "expected a number"),
        ("data.train", "None", "expected text"),
        ("optimizer.learnig_rate", "1", "'learning_rate' (nearest)"),
        ("optimiser.learning_rate", "1", "'optimizer' (nearest)"),
        ("learning_rate", "1", "'optimizer.learning_rate' (nearest)"),
        ("model", "1", "set by the config file"),
        ("family", "t5", "set by the config file"),
        ("model.heads", "3", "model.heads=3 does not divide model.width=128"),
        ("model.norm", "rsm", "there are rms, layer"),
        ("data.row_length", "256", "longer than model.context=128"),
        ("optimizer.warmup_steps", "1000", "must be less than training.steps=1000"),
        ("mesh.fsdp", "-1", "only one axis may be -1"),
        ("seed", "4294967296", "seed=4294967296"),
        ("generation.top_p", "1.5", "generation.top_p=1.5"),
        ("training.z_loss", "-1e-4", "training.z_loss=-0.0001: must be at least 0"),
        ("training.z_loss", "nan", "training.z_loss=nan: expected a number"),
    ],
)
def test_wrong_overrides_say_what_is_wrong(path, text, message):
    with pytest.raises(InputError) as error:
        resolved((path, text))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_unknown_family_and_variant():
    with pytest.raises(InputError, match="'gpt'"):
        config.default_config("gtp")
    with pytest.raises(InputError, match="unknown variant 'smke'; there are 'smoke'"):
        config.load("experiments/quickstart.py:smke")


def test_config_is_locked_and_typed():
    values = config.default_config("gpt")
    with pytest.raises(AttributeError, match="(?i)did you mean"):
        values.model.widht = 3
    with pytest.raises(TypeError):
        values.model.width = 2.5


@pytest.mark.parametrize("path", CORPORA, ids=lambda p: p.stem)
@pytest.mark.parametrize("variant", ["", ":smoke"])
def test_every_corpus_resolves(path, variant):
    found = config.resolve_preparation(config.load(f"{path}{variant}"))
    assert found == config.resolve_preparation(config.load(f"{path}{variant}"))
    assert found != config.resolve_preparation(config.default_config(config.CORPUS))


@pytest.mark.parametrize("path", CORPORA, ids=lambda p: p.stem)
def test_every_corpus_says_how_to_prepare_it(path):
    text = path.read_text()
    name = path.relative_to(ROOT).as_posix()
    assert f"python -m llm.prepare --config={name}" in text
    for word in ("Hardware:", "Time:", "Result:"):
        assert word in text, word
    assert name in (ROOT / "experiments" / "README.md").read_text()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
@pytest.mark.parametrize("variant", ["", ":smoke"])
def test_every_experiment_resolves_and_comes_back_equal(path, variant, tmp_path):
    experiment = config.resolve(config.load(f"{path}{variant}"))
    config.save(experiment, tmp_path / "config.json")
    again = config.read(tmp_path / "config.json")
    assert again == experiment and hash(again) == hash(experiment)
    assert config.differences(experiment, again) == []
    check_schedule(experiment)


def check_schedule(experiment):
    """The rate rises to its peak over the warm-up, ends no run there, and never rises again."""
    spec, steps = experiment.optimizer, experiment.training.steps
    rate = schedule(spec, steps)
    every = np.unique(np.linspace(0, steps, 400, dtype=int).tolist() + [spec.warmup_steps])
    rates = np.asarray(jax.vmap(rate)(jnp.asarray(every, jnp.int32)), np.float64) / spec.learning_rate
    peak = int(np.flatnonzero(every == spec.warmup_steps)[0])
    assert rates[0] == (0 if peak else 1) and abs(rates[peak] - 1) < 1e-6 and spec.warmup_steps < steps
    assert (np.diff(rates[: peak + 1]) > 0).all() and (np.diff(rates[peak:]) <= 1e-6).all()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_experiment_says_how_to_run_it(path):
    text = path.read_text()
    name = path.relative_to(ROOT).as_posix()
    assert f"python -m llm.train --config={name}" in text
    for word in ("Hardware:", "Time:", "Score:"):
        assert word in text, word
    assert name in (ROOT / "experiments" / "README.md").read_text()


@pytest.mark.parametrize("size, rate, steps", [("base", 6.9877e-4, 100_000), ("big", 4.9411e-4, 300_000)])
def test_the_transformer_is_trained_as_published(size, rate, steps):
    """Vaswani et al. 2017, sections 5.2 to 5.4; the rates are those of equation 3 at update 4,000."""
    found = config.resolve(config.load(f"experiments/published.py:encdec/{size}"))
    adam, training = found.optimizer, found.training
    assert (adam.name, adam.b1, adam.b2, adam.epsilon, adam.weight_decay) == ("adamw", 0.9, 0.98, 1e-9, 0.0)
    assert (adam.schedule, adam.warmup_steps, adam.clip_norm) == ("inverse_sqrt", 4000, None)
    assert adam.learning_rate == pytest.approx(rate, rel=1e-4)
    assert (training.label_smoothing, training.steps) == (0.1, steps)
    model = found.model
    assert isinstance(model, models.EncDecSpec) and not model.pre_norm and model.position == "sinusoid"
    assert config.resolve(config.load("experiments/published.py:t5/base")).training.label_smoothing == 0.0


def test_differences_name_the_fields():
    old, new = resolved(), resolved(("model.layers", "6"), ("optimizer.clip_norm", "None"))
    assert config.differences(old, new) == ["model.layers: 4 -> 6", "optimizer.clip_norm: 1.0 -> None"]


def test_read_refuses_unknown_missing_and_mistyped_fields(tmp_path):
    path: pathlib.Path = tmp_path / "config.json"
    config.save(resolved(), path)
    text = path.read_text()
    for wrong, right, message in [
        ('"layers": 4', '"layres": 4', "layres"),
        ('"layers": 4,', "", "model.layers is missing"),
        ('"layers": 4', '"layers": "four"', "expected an integer"),
        ('"seed": 0', '"sede": 0', "unknown section 'sede'"),
        ('"seed": 0,', "", "seed is missing"),
    ]:
        path.write_text(text.replace(wrong, right, 1))
        with pytest.raises(InputError, match=message):
            config.read(path)


def test_a_field_younger_than_a_run_is_at_its_default(tmp_path):
    config.save(resolved(), tmp_path / "config.json")
    values = json.loads((tmp_path / "config.json").read_text())
    del values["optimizer"]["layer_decay"], values["training"]["max_skipped"], values["mesh"]["expert"]
    del values["model"]["width_base"]  # off by default: of a model's fields, these alone may be missing
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert config.read(tmp_path / "config.json") == resolved()


@pytest.mark.parametrize("old, new", [(False, ""), (True, "all")])
def test_rematerialisation_that_was_true_or_false_is_read(old, new, tmp_path):
    config.save(resolved(), tmp_path / "config.json")
    values = json.loads((tmp_path / "config.json").read_text())
    values["model"]["remat"] = old
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert config.read(tmp_path / "config.json") == resolved(("model.remat", new))


def test_specs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        resolved().model.layers = 3


def test_the_config_of_a_run_is_a_config(tmp_path):
    experiment = resolved(
        ("optimizer.learning_rate", "1"), ("data.holdout", "a,b"), ("seed", "7"), ("model.layers", "2")
    )
    path = tmp_path / "config.json"
    config.save(experiment, path)
    assert config.resolve(config.load(str(path))) == experiment
    changed = config.resolve(config.override(config.load(str(path)), [("training.steps", "500")]))
    assert changed == dataclasses.replace(experiment, training=dataclasses.replace(experiment.training, steps=500))
    with pytest.raises(InputError, match="has no variants"):
        config.load(f"{path}:smoke")
    path.write_text("{}")
    with pytest.raises(InputError, match="config.json"):
        config.load(str(path))
