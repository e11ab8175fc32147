"""Published sizes by name: `experiments/published.py:gpt/gpt2-xl`, `:bert/base`, `:t5/v1.1-small`, `:encdec/big`.

The model is the paper's, and of `encdec` the recipe too, but for the size of a batch; the data are the ones that ship,
so name your own before training one of them:

    python -m llm.train --config=experiments/published.py:bert/base --show-parameters
    python -m llm.train --config=experiments/published.py:gpt/gpt2 --workdir=runs/gpt2 --config.data.train=my/texts

Hardware:  from one GPU (gpt2, bert/base) to a pod; the variant `smoke`, a gpt2 made tiny, runs on two CPU cores
Time:      as long as you give it; `smoke` under a minute
Score:     none is claimed: parameters are counted by tests/models/test_presets.py
"""

from typing import Any

from llm import models
from llm.config import Config, default_config, with_variant
from llm.errors import InputError

# What each family learns here where nothing else is said.
NOVELS: dict[str, Any] = {"data.train": "austen", "data.holdout": ("persuasion",)}
DATA: dict[str, dict[str, Any]] = {
    "rnn": NOVELS | {"objective.stream": True},
    "gpt": NOVELS,
    "bert": NOVELS | {"objective.kind": "masked", "tokenizer.kind": "wordpiece"},
    "t5": NOVELS | {"objective.kind": "span_corruption", "tokenizer.kind": "unigram", "tokenizer.sentinels": 100},
    "encdec": {
        "objective.kind": "seq2seq",
        "data.train": "libreoffice_en_de",
        "data.fields": ("text", "target"),
        "data.packing": "whole",
    },
    "classifier": {
        "objective.kind": "classification",
        "data.train": "r8/train",
        "data.validation": "r8/test",
        "data.label": "label",
        "data.packing": "whole",
        "data.row_length": 100,
        "tokenizer.kind": "wordpiece",
        "tokenizer.vocab_size": 1000,
    },
}
# Vaswani et al. 2017, section 5: Adam without decay, nothing clipped. `big` is trained three times as long.
WARMUP = 4000
RECIPE: dict[str, Any] = {
    "training.label_smoothing": 0.1,
    "optimizer.schedule": "inverse_sqrt",
    "optimizer.warmup_steps": WARMUP,
    "optimizer.b2": 0.98,
    "optimizer.epsilon": 1e-9,
    "optimizer.weight_decay": 0.0,
    "optimizer.clip_norm": None,
}
STEPS = {"base": 100_000, "big": 300_000}
SMOKE: dict[str, Any] = {
    "model.layers": 2,
    "model.width": 32,
    "model.heads": 2,
    "model.vocab_size": None,
    "tokenizer.vocab_size": 512,
    "training.steps": 10,
    "training.checkpoint_every": 10,
    "optimizer.warmup_steps": 2,
}


def get_config(variant: str = "gpt/gpt2") -> Config:
    """The config of `family/preset`, or `smoke`."""
    family, _, preset = ("gpt/gpt2" if variant in ("", "smoke") else variant).partition("/")
    if not preset and family in models.PRESETS:
        raise InputError(f"name a size of {family}: {', '.join(f'{family}/{name}' for name in models.PRESETS[family])}")
    config = default_config(family, preset)
    changes = DATA.get(family, {}) | (SMOKE if variant == "smoke" else {})
    if family == "encdec":
        # The paper's equation 3 at its peak.
        rate = config.model.width**-0.5 * WARMUP**-0.5
        changes |= RECIPE | {"training.steps": STEPS[preset], "optimizer.learning_rate": rate}
    return with_variant(config, variant or "gpt/gpt2", **{variant or "gpt/gpt2": changes})
