"""A GPT on Jane Austen: the model of experiments/quickstart.py.

One of three models of equal size that are given the same time: experiments/rnn, gpt and t5, each austen.py.

Command:   python -m llm.train --config=experiments/gpt/austen.py --workdir=runs/gpt-austen
Hardware:  two CPU cores
Time:      not measured yet in full
Score:     not measured yet in full
"""

from experiments.austen import SMOKE, novels
from llm.config import Config, with_variant


def get_config(variant: str = "") -> Config:
    """The full run, or `smoke`: the same path in a few steps."""
    config = novels("gpt")
    config.model.context = 128
    config.model.layers = 4
    config.model.width = 128
    config.model.heads = 4
    config.model.activation = "relu2"
    config.model.qk_norm = True
    config.model.scale_embedding = True
    config.model.unroll = 4

    config.training.steps = 2200
    config.training.batch_size = 8
    config.optimizer.learning_rate = 3.5e-3
    config.optimizer.weight_decay = 0.4
    return with_variant(config, variant, smoke=SMOKE | {"model.unroll": 2})
