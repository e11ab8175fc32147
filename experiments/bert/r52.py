"""R52, fifty-two topics of Reuters news, most of them rare: the pre-trained encoder and a bag of words.

Command:   python -m llm.train --config=experiments/bert/r52.py --workdir=runs/bert-r52
Needs:     runs/bert-pretrain (experiments/bert/pretrain.py); the variant `scratch` does without
Hardware:  two CPU cores
Time:      not measured yet in full
Score:     not measured yet in full
"""

from experiments.bert.fine_tuning import SCRATCH, SMOKE, classifier
from llm.config import Config, with_variant


def get_config(variant: str = "") -> Config:
    """The full run; `scratch`, which trains encoder and tokenizer anew; or `smoke`."""
    config = classifier("r52/train", "r52/test", 512, (32, 64, 128, 256, 512), 1000)
    return with_variant(config, variant, smoke=SMOKE, scratch=SCRATCH)
