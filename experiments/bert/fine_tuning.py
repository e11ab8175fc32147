"""What the classifiers that start from experiments/bert/pretrain.py have in common.

The encoder reads the first 128 tokens of a text, the bag of words all of them. The tokenizer and the encoder are those
of runs/bert-pretrain: train that first.
"""

from typing import Any

from experiments.bert.small import small_bert
from llm.config import Config, with_variant

PRETRAINED = "runs/bert-pretrain"
# Without the pre-trained encoder: its tokenizer is trained anew, on the texts at hand.
SCRATCH: dict[str, Any] = {"tokenizer.path": "", "training.start_from": ""}
# Topics are told by their words: there a small encoder beside the bag does best, with words of its own.
TOPICS = SCRATCH | {"model.layers": 1, "model.width": 64, "model.unroll": 1}
SMOKE: dict[str, Any] = SCRATCH | {
    "data.row_length": 64,
    "data.buckets": (64,),  # one length, one compilation
    "tokenizer.vocab_size": 1000,
    "model.layers": 2,
    "model.width": 32,
    "model.heads": 2,
    "training.steps": 20,
    "training.validate_every": 10,
    "training.validation_rows": 64,
    "training.checkpoint_every": 20,
    "optimizer.warmup_steps": 5,
}


def classifier(train: str, validation: str, row_length: int, buckets: tuple[int, ...], steps: int) -> Config:
    """The config of one corpus.

    Args:
        train: the corpus.
        validation: its test set, or "" for a tenth of it.
        row_length: the longest text, for the bag.
        buckets: lengths that batches are padded to.
        steps: steps of the run.
    """
    config = small_bert(steps)
    config.data.train = train
    config.data.validation = validation
    config.data.label = "label"
    config.data.row_length = row_length
    config.data.buckets = buckets
    config.tokenizer.kind = "wordpiece"
    config.tokenizer.lowercase = True
    config.tokenizer.vocab_size = 8192
    config.tokenizer.path = f"{PRETRAINED}/tokenizer.json"
    config.objective.kind = "classification"

    config.model.pooling = "mean"
    config.model.bag = 30.0
    config.model.dropout = 0.1

    config.training.start_from = PRETRAINED
    config.training.batch_size = 32
    config.evaluation.batch_size = 64
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 50
    config.optimizer.weight_decay = 0.1
    return config


def topics(config: Config, variant: str) -> Config:
    """A small encoder that starts from nothing; the variant `pretrained` leaves the config as it is."""
    if variant != "pretrained":
        config = with_variant(config, "own", own=TOPICS)
    return with_variant(config, variant, smoke=SMOKE, pretrained={})
