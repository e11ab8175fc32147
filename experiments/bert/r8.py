"""R8, eight topics of Reuters news: the pre-trained encoder and a bag of words.

Command:   python -m llm.train --config=experiments/bert/r8.py --workdir=runs/bert-r8
Needs:     runs/bert-pretrain (experiments/bert/pretrain.py); the variant `scratch` does without
Hardware:  two CPU cores
Time:      not measured yet in full
Score:     not measured yet in full
"""

from experiments.bert.fine_tuning import SCRATCH, SMOKE, classifier
from llm.config import Config, with_variant


def get_config(variant: str = "") -> Config:
    """The full run; `scratch`, which trains encoder and tokenizer anew; or `smoke`."""
    config = classifier("r8/train", "r8/test", 512, (32, 64, 128, 256, 512), 850)
    return with_variant(config, variant, smoke=SMOKE, scratch=SCRATCH)
