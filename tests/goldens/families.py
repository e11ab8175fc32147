"""The first losses of a tiny run of every family, as `families.json` keeps them.

    python -m tests.goldens.families

writes that file anew. A run is float32 on one CPU device, jitted, on batches drawn by numpy.
"""

import functools
import json
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import numpy as np

from llm import models
from llm.models import BertSpec, ClassifierSpec, EncDecSpec, GPTSpec, RNNSpec, T5Spec
from llm.training import losses, optimizer
from llm.training.spec import OptimizerSpec
from llm.training.state import Recipe
from llm.training.step import train_step
from tests.quick import quick

PATH = pathlib.Path(__file__).with_suffix(".json")
STEPS = 20
V, B, T, S = 29, 4, 12, 9
OPTIMIZER = OptimizerSpec(learning_rate=0.01, warmup_steps=2)
Batch = dict[str, np.ndarray]


def _text(rng: np.random.Generator, length: int) -> np.ndarray:
    """Rows that count up in steps of their own."""
    first, step = rng.integers(0, V, (B, 1)), rng.integers(1, 4, (B, 1))
    return (first + step * np.arange(length)) % V


def _segments(rng: np.random.Generator, length: int) -> np.ndarray:
    return (np.arange(length) < rng.integers(length // 2, length + 1, (B, 1))).astype(np.int32)


def _row(tokens: np.ndarray, segments: np.ndarray) -> Batch:
    return {"tokens": tokens, "segments": segments, "positions": np.tile(np.arange(tokens.shape[1]), (B, 1))}


def causal(rng: np.random.Generator) -> Batch:
    """Rows of two documents and padding; for models that carry a state, every second goes on."""
    text = _text(rng, T + 1)
    segments = np.tile([1] * 5 + [2] * 5 + [0] * 2, (B, 1))
    return {
        **_row(text[:, :-1], segments), "positions": np.tile([*range(5), *range(5), 0, 1], (B, 1)),
        "targets": text[:, 1:], "weights": (segments != 0).astype(np.float32), "continues": np.arange(B) % 2,
    }  # fmt: skip


def classification(rng: np.random.Generator) -> Batch:
    """Whether a row counts in threes."""
    text = _text(rng, T)
    labels = ((text[:, 1] - text[:, 0]) % V == 3).astype(np.int32)
    return _row(text, _segments(rng, T)) | {"labels": labels, "weights": np.ones(B, np.float32)}


def seq2seq(rng: np.random.Generator) -> Batch:
    """The source backwards."""
    source, segments = _text(rng, S), _segments(rng, S)
    target = np.where(segments, source, 0)[:, ::-1]
    real = np.ascontiguousarray(segments[:, ::-1])
    row = _row(np.roll(target, 1, axis=1), np.ones_like(real))
    from_source = {f"source_{key}": x for key, x in _row(source, segments).items()}
    return row | from_source | {"targets": target, "weights": real.astype(np.float32)}


def masked(rng: np.random.Generator) -> Batch:
    """A token in five is hidden, the second half is another text for label 0."""
    text, other, labels = _text(rng, T), _text(rng, T), rng.integers(0, 2, B)
    second = np.arange(T) >= T // 2
    text = np.where(second & (labels == 0)[:, None], other, text)
    chosen = rng.random((B, T)) < 0.2
    return _row(np.where(chosen, V - 1, text), np.ones((B, T), np.int32)) | {
        "types": np.tile(second, (B, 1)), "targets": np.where(chosen, text, 0), "weights": chosen.astype(np.float32),
        "labels": labels, "label_weights": np.ones(B, np.float32),
    }  # fmt: skip


class Run(NamedTuple):
    """A family's spec, its objective, what makes a batch of a generator, and the loss's settings."""

    spec: models.ModelSpec
    objective: str
    batch: Callable[[np.random.Generator], Batch]
    settings: losses.Settings = losses.Settings()


_SMALL = dict(vocab_size=V, layers=2, width=16, heads=4, ff_width=24, dropout=0.0, attention="reference")
RUNS = {
    "rnn": Run(
        RNNSpec(vocab_size=V, layers=2, width=16, dropout=0.1, recurrent_dropout=0.1, carry=True), "causal", causal
    ),
    "classifier": Run(ClassifierSpec(**_SMALL, context=16, classes=2), "classification", classification),
    "encdec": Run(EncDecSpec(**_SMALL), "seq2seq", seq2seq, losses.Settings(smoothing=0.1)),
    "bert": Run(
        BertSpec(**_SMALL, attention_dropout=0.0, context=16, pre_norm=True), "masked", masked,
        losses.Settings(loss_chunk=16, masked_share=0.2),
    ),
    # No experts: a token on the border between two would make another loss of another rounding.
    "gpt": Run(
        GPTSpec(**_SMALL | {"dropout": 0.1}, context=16, kv_heads=2, activation="silu", gated=True, tied=False,
                qk_norm=True, qkv_bias=True, scale_embedding=True, windows=(0, 3)),
        "causal", causal,
    ),
    "t5": Run(T5Spec(**_SMALL, activation="gelu_tanh", gated=True), "span_corruption", seq2seq),
}  # fmt: skip


def losses_of(family: str) -> list[float]:
    """The losses of the first STEPS steps, before each update."""
    run = RUNS[family]
    model = models.build(run.spec)
    adam = optimizer.build(OPTIMIZER, STEPS)
    recipe = Recipe(model, adam, run.objective, seed=0, batch_size=B)
    state = quick(lambda: recipe.create(unbox=nn.unbox))()
    step = quick(
        functools.partial(
            train_step, loss=losses.sums(model, run.objective, run.settings), optimizer=adam,
            schedule=optimizer.schedule(OPTIMIZER, STEPS), clip_norm=OPTIMIZER.clip_norm,
        )
    )  # fmt: skip
    rng, found = np.random.default_rng(0), []
    batches = [run.batch(rng), run.batch(rng)]
    for number in range(STEPS):
        batch = batches[number % 2].items()
        batch = {key: x.astype(np.float32 if x.dtype.kind == "f" else np.int32) for key, x in batch}
        state, metrics = step(state, batch)
        found.append(float(metrics["loss"]))
    return found


def main() -> None:
    found = {family: losses_of(family) for family in RUNS}
    PATH.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
