"""20 Newsgroups, split by date: a small encoder and a bag of words and pairs.

Command:   python -m llm.train --config=experiments/bert/newsgroups.py --workdir=runs/bert-newsgroups
Needs:     nothing; the variant `pretrained` starts from runs/bert-pretrain (experiments/bert/pretrain.py)
Hardware:  two CPU cores
Time:      about 6 min on one slow core
Score:     not measured yet in full
"""

from experiments.bert.fine_tuning import classifier, topics
from llm.config import Config


def get_config(variant: str = "") -> Config:
    """The full run; `pretrained`, the encoder of experiments/bert/pretrain.py fine-tuned; or `smoke`."""
    config = classifier("20ng/train", "20ng/test", 1024, (128, 256, 1024), 900)
    config.model.bag_pairs = 2**16
    return topics(config, variant)
