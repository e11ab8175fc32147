"""R8, eight topics of Reuters news, by a GRU that reads the text in both directions.

Command:   python -m llm.train --config=experiments/rnn/r8.py --workdir=runs/rnn-r8
Hardware:  two CPU cores
Time:      2 min 53 s on one core beside other work, 2 min 8 s of it training; 829,256 parameters
Score:     92.65 % of the 2,189 test texts (91.50 to 93.60), macro F1 60.2; one seed. That is behind linear SVMs on the
           same texts, 97.12 and 97.40, Text GCN as published, 97.07, and experiments/bert/r8.py, which reads a bag of
           all words too, 97.38
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
