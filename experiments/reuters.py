"""What the readers of R8 outside BERT have in common: the data of experiments/bert/r8.py, and how it is learned.

Nothing is pre-trained and there is no bag of words: what is told of a text is told from its first 128 tokens.
"""

from typing import Any

from llm.config import Config, default_config

LENGTH = 128
SMOKE: dict[str, Any] = {
    "data.row_length": 64,
    "data.buckets": (64,),  # one length, one compilation
    "tokenizer.vocab_size": 1000,
    "model.width": 32,
    "training.steps": 20,
    "training.validate_every": 10,
    "training.validation_rows": 64,
    "training.checkpoint_every": 20,
    "optimizer.warmup_steps": 5,
}


def r8(family: str, steps: int) -> Config:
    """The config of R8 by a family, its test set the validation set; the model is left to say."""
    config = default_config(family)
    config.data.train = "r8/train"
    config.data.validation = "r8/test"
    config.data.label = "label"
    config.data.packing = "whole"
    config.data.row_length = LENGTH
    config.data.buckets = (32, 64, LENGTH)
    config.tokenizer.kind = "wordpiece"
    config.tokenizer.lowercase = True
    config.tokenizer.vocab_size = 8192
    config.objective.kind = "classification"
    config.model.pooling = "mean"

    config.training.steps = steps
    config.training.batch_size = 32
    config.training.validate_every = max(steps // 5, 1)
    config.training.validation_rows = 512
    config.training.checkpoint_every = steps
    config.evaluation.batch_size = 64
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 50
    config.optimizer.schedule = "linear"
    config.optimizer.final_fraction = 0.0
    config.optimizer.b2 = 0.98
    config.optimizer.weight_decay = 0.1
    return config
