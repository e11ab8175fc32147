"""The config of runs that are killed again and again: the least that has dropout, a carried state and checkpoints."""

from llm.config import Config, default_config


def get_config(variant: str = "") -> Config:
    """A recurrent layer that is traced in a second, and a checkpoint every few of many short steps."""
    del variant
    config = default_config("rnn")
    config.data.holdout = ("part7",)
    config.data.row_length = 16
    config.tokenizer.vocab_size = 300
    config.model.layers = 1
    config.model.width = 16
    config.model.dropout = 0.1
    config.model.carry = config.objective.stream = True
    config.training.steps = 140
    config.training.batch_size = 2
    config.training.log_every = 1
    config.training.validate_every = 1000
    config.training.checkpoint_every = 5
    config.training.ema_decay = 0.9
    config.optimizer.warmup_steps = 4
    config.evaluation.batch_size = 16
    return config
