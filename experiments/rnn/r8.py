"""R8, eight topics of Reuters news, by a GRU that reads the text in both directions.

Command:   python -m llm.train --config=experiments/rnn/r8.py --workdir=runs/rnn-r8
Hardware:  two CPU cores
Time:      not measured yet; 829,256 parameters
Score:     none yet. On the same texts linear SVMs have 97.12 and 97.40, Text GCN as published 97.07, and
           experiments/bert/r8.py, which reads a bag of all words too, 97.38
"""

from experiments.reuters import SMOKE, r8
from llm.config import Config, with_variant


def get_config(variant: str = "") -> Config:
    """The full run, or `smoke`: the same path in a few steps."""
    config = r8("rnn", 850)
    config.model.cell = "gru"
    config.model.layers = 1
    config.model.width = 96
    config.model.bidirectional = True
    config.model.dropout = 0.2
    return with_variant(config, variant, smoke=SMOKE)
