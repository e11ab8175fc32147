"""R52, 52 topics of Reuters-21578: labelled news with the usual split.

The test set stays whole (2,568 texts). Of training, 88 texts go that stand twice, eight of them because they stand in
the test set; four texts of one line have two topics, "interest" and "money-fx", of which one is kept.

Command:   python -m llm.prepare --config=experiments/corpora/r52.py --workdir=runs/r52
Hardware:  two CPU cores
Time:      6 s
Result:    9,100 texts read, 9,012 kept; 789,395 training tokens in 6,444 rows of up to 512
"""

from experiments.corpora import r8
from llm.config import Config, with_variant


def get_config(variant: str = "") -> Config:
    """The whole corpus, or `smoke`: a small vocabulary (the first documents are all of one class)."""
    config = r8.get_config()
    config.data.train, config.data.validation = "r52/train", "r52/test"
    return with_variant(config, variant, smoke={"tokenizer.vocab_size": 1000})
