"""20 Newsgroups, split by date: the pre-trained encoder and a bag of words and pairs.

Command:   python -m llm.train --config=experiments/bert/newsgroups.py --workdir=runs/bert-newsgroups
Needs:     runs/bert-pretrain (experiments/bert/pretrain.py); the variant `scratch` does without
Hardware:  two CPU cores
Time:      not measured yet in full
Score:     not measured yet in full
"""

from experiments.bert.fine_tuning import SCRATCH, SMOKE, classifier
from llm.config import Config, with_variant


def get_config(variant: str = "") -> Config:
    """The full run; `scratch`, which trains encoder and tokenizer anew; or `smoke`."""
    config = classifier("20ng/train", "20ng/test", 1024, (64, 128, 256, 512, 1024), 1800)
    config.model.bag_pairs = 2**16
    return with_variant(config, variant, smoke=SMOKE, scratch=SCRATCH)
