"""R52, fifty-two topics of Reuters news, most of them rare: a small encoder and a bag of words.

Command:   python -m llm.train --config=experiments/bert/r52.py --workdir=runs/bert-r52
Needs:     nothing; the variant `pretrained` starts from runs/bert-pretrain (experiments/bert/pretrain.py)
Hardware:  two CPU cores
Time:      not measured yet in full
Score:     not measured yet in full
"""

from experiments.bert.fine_tuning import classifier, topics
from llm.config import Config


def get_config(variant: str = "") -> Config:
    """The full run; `pretrained`, the encoder of experiments/bert/pretrain.py fine-tuned; or `smoke`."""
    config = classifier("r52/train", "r52/test", 512, (32, 64, 128, 256, 512), 1000)
    return topics(config, variant)
