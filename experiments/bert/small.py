"""The small BERT of these experiments: its shape, and the schedule that all of them are learned by.

A run that starts from another one takes over what has the same shape, so pre-training and fine-tuning share this.
"""

from llm.config import Config, default_config


def small_bert(steps: int) -> Config:
    """The encoder, its optimizer and a run of so many steps, looked at five times on the way and saved at its end.

    Data, objective, batches and rates are left to say.
    """
    config = default_config("bert")
    config.data.packing = "whole"
    config.model.context = 128
    config.model.layers = 2
    config.model.width = 128
    config.model.heads = 2
    config.model.pre_norm = True
    config.model.attention_dropout = 0.0  # its random bits cost a CPU much of a step
    config.model.unroll = 2
    config.optimizer.schedule = "linear"
    config.optimizer.final_fraction = 0.0
    config.optimizer.b2 = 0.98
    config.training.steps = steps
    config.training.validate_every = max(steps // 5, 1)
    config.training.validation_rows = 512
    config.training.checkpoint_every = steps
    return config
