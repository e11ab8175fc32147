"""20 Newsgroups, split by date: a small encoder and a bag of words and pairs.

Command:   python -m llm.train --config=experiments/bert/newsgroups.py --workdir=runs/bert-newsgroups
Needs:     nothing; the variant `pretrained` starts from runs/bert-pretrain (experiments/bert/pretrain.py)
Hardware:  two CPU cores
Time:      6 min 25 s on one slow core, 5 min 12 s of it training; 2,062,868 parameters
Score:     86.15 % of the 7,528 test texts by three seeds (85.81, 86.18, 86.45; interval of one: 85.0 to 87.2), macro F1
           85.5; the three averaged (`llm.evaluate --ensemble`) 87.50, macro F1 86.9. Linear SVMs on the same texts have
           85.19 and 86.15 (pairs of words too), Text GCN as published 86.34

What helps: averaging, which puts it before its peers. What does not: label smoothing of .1, by which --config.seed=1
has 85.64 for 85.81. `pretrained` was not run to its end.
"""

from experiments.bert.fine_tuning import classifier, topics
from llm.config import Config


def get_config(variant: str = "") -> Config:
    """The full run; `pretrained`, the encoder of experiments/bert/pretrain.py fine-tuned; or `smoke`."""
    config = classifier("20ng/train", "20ng/test", 1024, (128, 256, 1024), 900)
    config.model.bag_pairs = 2**16
    return topics(config, variant)
