"""R8, eight topics of Reuters news, by the text classifier: an encoder, and a decoder that reads the text again.

Command:   python -m llm.train --config=experiments/classifier/r8.py --workdir=runs/classifier-r8
Hardware:  two CPU cores
Time:      3 min 9 s on one core, 2 min 47 s of it training; 649,992 parameters
Score:     96.04 % of the 2,189 test texts by three seeds (95.75, 95.84, 96.53), macro F1 87.2. That is behind linear
           SVMs on the same texts, 97.12 and 97.40, Text GCN as published, 97.07, and experiments/bert/r8.py, which
           reads a bag of all words too, 97.38
"""

from experiments.reuters import LENGTH, SMOKE, r8
from llm.config import Config, with_variant


def get_config(variant: str = "") -> Config:
    """The full run, or `smoke`: the same path in a few steps."""
    config = r8("classifier", 850)
    config.model.context = LENGTH
    config.model.layers = 1
    config.model.width = 64
    config.model.heads = 2
    config.model.ff_width = 256
    config.model.pre_norm = True
    return with_variant(config, variant, smoke=SMOKE)
