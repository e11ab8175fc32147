"""An LSTM on Jane Austen: its state goes on from batch to batch.

As large as the GPT of experiments/quickstart.py, on the same text.

Command:   python -m llm.train --config=experiments/rnn/austen.py --workdir=runs/rnn-austen
Hardware:  two CPU cores
Time:      15 min 25 s on one slow core, 14 min 42 s of it training; the GPT takes 15 min 2 s of training there;
           1,298,304 parameters
Score:     1.898 bits per byte on Persuasion (validation loss 4.68 nats a token), the GPT's being 1.685; one seed
"""

from experiments.austen import SMOKE, novels
from llm.config import Config, with_variant


def get_config(variant: str = "") -> Config:
    """The full run, or `smoke`: the same path in a few steps."""
    config = novels("rnn")
    config.objective.stream = True
    config.model.cell = "lstm"
    config.model.layers = 2
    config.model.width = 184
    config.model.carry = True
    config.model.dropout = 0.1
    config.model.unroll = 2

    config.training.steps = 1500
    config.training.batch_size = 16
    config.optimizer.learning_rate = 4e-3
    config.optimizer.weight_decay = 0.1
    return with_variant(config, variant, smoke=SMOKE)
