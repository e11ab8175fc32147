"""A T5 on Jane Austen: the encoder reads the row before, the decoder goes on.

As large as the GPT of experiments/quickstart.py, on the same text.

Command:   python -m llm.train --config=experiments/t5/austen.py --workdir=runs/t5-austen
Hardware:  two CPU cores
Time:      20 min 56 s on one slow core beside other work, 19 min 54 s of it training: a third more than the GPT's
           15 min 2 s
Score:     2.000 bits per byte on Persuasion (validation loss 4.93 nats a token), the GPT's being 1.685; one seed
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

    config.training.steps = 2300
    config.training.batch_size = 8
    config.optimizer.learning_rate = 3.5e-3
    config.optimizer.weight_decay = 0.1
    return with_variant(config, variant, smoke=SMOKE | {"model.ff_width": 64})
