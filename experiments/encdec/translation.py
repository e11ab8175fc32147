"""What the translations have in common: the Transformer (sinusoids, one table), made small, and how it is learned.

experiments/t5/translations.py takes the T5 in its place.
"""

from typing import Any

from llm.config import Config, default_config

# As published: normalised after each part, a rate that falls with the inverse square root of the step.
PUBLISHED: dict[str, Any] = {
    "model.layers": 3,
    "model.unroll": 3,
    "model.pre_norm": False,
    "model.dropout": 0.25,
    "training.steps": 3000,
    "training.batch_size": 64,
    "optimizer.schedule": "inverse_sqrt",
    "optimizer.learning_rate": 2e-3,
    "optimizer.warmup_steps": 400,
}
SMOKE: dict[str, Any] = {
    "data.max_documents": 300,
    "tokenizer.vocab_size": 500,
    "model.layers": 1,
    "model.unroll": 1,
    "model.width": 32,
    "model.heads": 2,
    "training.steps": 20,
    "training.batch_size": 16,
    "training.validate_every": 10,
    "training.checkpoint_every": 20,
    "optimizer.warmup_steps": 5,
    "data.row_length": 32,
    "data.buckets": (32,),
}


def translation(corpus: str, language: str, family: str = "encdec") -> Config:
    """The config of a corpus of pairs whose second field is of a language, by an encoder-decoder of a family."""
    config = default_config(family)
    config.data.train = corpus
    config.data.fields = ("text", "target")
    config.data.packing = "whole"
    config.data.row_length = 128
    config.data.buckets = (16, 32, 64, 128)
    config.data.validation_fraction = 0.05
    config.tokenizer.kind = "unigram"
    config.tokenizer.vocab_size = 4000
    config.objective.kind = "seq2seq"

    config.model.layers = 2
    config.model.width = 192
    config.model.heads = 4
    config.model.ff_width = 768
    config.model.dropout = 0.1
    config.model.unroll = 2
    if family == "encdec":  # a T5 has no other way
        config.model.pre_norm = True

    config.training.steps = 2400
    config.training.batch_size = 32
    config.training.label_smoothing = 0.1
    config.training.validate_every = 400
    config.training.validation_rows = 512
    config.training.checkpoint_every = 800
    config.evaluation.batch_size = 64
    config.evaluation.language = language
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.schedule = "linear"
    config.optimizer.final_fraction = 0.0
    config.optimizer.b2 = 0.98
    config.optimizer.epsilon = 1e-9
    config.optimizer.weight_decay = 0.0
    return config
