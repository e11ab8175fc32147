"""A T5 on Jane Austen: the encoder reads the row before, the decoder goes on.

As large as the GPT of experiments/quickstart.py, on the same text.

Command:   python -m llm.train --config=experiments/t5/austen.py --workdir=runs/t5-austen
Hardware:  two CPU cores
Time:      11 min 55 s on one core, 11 min 8 s of it training, at 5,335 tokens/s. On the day when the GPT took its
           15 min 2 s, at 2,497 tokens/s, this one had 3,945: its 1,740 steps are then 15 min 3 s; 1,312,512 parameters
Score:     2.079 bits per byte on Persuasion (validation loss 5.13 nats a token), the GPT's being 1.685; one seed. With
           2,300 steps, a third longer, 2.000
"""

from experiments.austen import SMOKE, novels
from llm.config import Config, with_variant


def get_config(variant: str = "") -> Config:
    """The full run, or `smoke`: the same path in a few steps."""
    config = novels("t5")
    config.objective.kind = "continuation"
    config.model.layers = 2
    config.model.width = 128
    config.model.heads = 4
    config.model.ff_width = 384
    config.model.dropout = 0.0
    config.model.unroll = 2

    config.training.steps = 1740
    config.training.batch_size = 8
    config.optimizer.learning_rate = 1.2e-3
    config.optimizer.rates = ("embedding=30",)  # the table has deviation 1, as published
    config.optimizer.weight_decay = 0.1
    return with_variant(config, variant, smoke=SMOKE | {"model.ff_width": 64})
