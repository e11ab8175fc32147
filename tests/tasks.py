"""The configs of the tests' runs of every family and objective: variants by name, all of them small."""

from llm.config import Config, default_config
from llm.errors import InputError

VARIANTS = ("pretrain", "fine_tune", "rnn", "classifier", "answers", "pairs", "translate", "t5", "stream")


def get_config(variant: str = "") -> Config:
    """The config of one variant; the data are the test's."""
    if variant not in VARIANTS:
        raise InputError(f"unknown variant {variant!r}; there are {', '.join(VARIANTS)}")
    family = {"rnn": "rnn", "stream": "rnn", "classifier": "classifier", "translate": "encdec", "t5": "t5"}
    config = default_config(family.get(variant, "bert"))
    config.data.packing = "whole"
    config.data.row_length = 32
    config.data.validation_fraction = 0.3
    config.tokenizer.kind = "wordpiece"
    config.tokenizer.vocab_size = 120
    config.objective.kind = "classification"
    config.training.steps = 12
    config.training.batch_size = 8
    config.training.log_every = 2
    config.training.validate_every = 6
    config.training.validation_rows = 8
    config.training.checkpoint_every = 4
    config.optimizer.warmup_steps = 2
    config.optimizer.learning_rate = 1e-2
    config.evaluation.batch_size = 8
    config.model.width = 16
    config.model.layers = 2
    if family.get(variant) not in ("rnn",):
        config.model.heads = 2
        config.model.ff_width = 32
        config.model.attention = "reference"  # compiles fastest; the conformance table covers the others
    if variant in ("rnn", "classifier", "fine_tune"):
        config.data.label = "label"
    if variant == "rnn":
        config.model.bidirectional = True
        config.model.bag = 3.0
    elif variant == "pretrain":
        config.objective.kind = "masked"
        config.objective.next_sentence = True
        config.training.loss_chunk = 16
    elif variant == "answers":
        config.objective.kind = "span_qa"
        config.data.fields = ("question", "text")
        config.data.answer = "answer"
    elif variant == "pairs":
        config.objective.kind = "contrastive"
        config.data.fields = ("text", "target")
    elif variant in ("translate", "t5"):
        config.objective.kind = "seq2seq"
        config.data.fields = ("text", "target")
        config.tokenizer.kind = "bytes"
        config.tokenizer.vocab_size = 257
        config.data.row_length = 64
        config.generation.prompts = ("one two",)
        config.generation.max_tokens = 4
        config.optimizer.schedule = "inverse_sqrt"
        config.training.label_smoothing = 0.1
    elif variant == "stream":
        config.objective.kind = "causal"
        config.objective.stream = True
        config.model.carry = True
        config.model.dropout = 0.1
        config.data.packing = "concatenate"
        config.data.row_length = 16
        config.generation.prompts = ("one two",)
        config.generation.max_tokens = 4
    return config
