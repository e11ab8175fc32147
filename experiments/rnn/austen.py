"""An LSTM on Jane Austen: its state goes on from batch to batch.

As large as the GPT of experiments/quickstart.py, on the same text.

Command:   python -m llm.train --config=experiments/rnn/austen.py --workdir=runs/rnn-austen
Hardware:  two CPU cores
Time:      12 min 51 s and 13 min 57 s on one core, of it 12 min 21 s and 13 min 24 s training; on the other, the
           GPT trained for 11 min 55 s and 12 min 45 s; 1,298,304 parameters
Score:     1.910 bits per byte on Persuasion by three seeds (1.891, 1.898, 1.939; validation loss 4.71 nats a token),
           the GPT's being 1.682
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
