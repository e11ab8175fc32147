"""R52, 52 topics of Reuters-21578: labelled news with the usual split.

The test set stays whole (2,568 texts). Of training, 88 texts go that stand twice, eight of them because they stand in
the test set; four texts of one line have two topics, "interest" and "money-fx", of which one is kept.

Command:   python -m llm.prepare --config=experiments/corpora/r52.py --workdir=runs/r52
Hardware:  two CPU cores
Time:      6 s
Result:    9,100 texts read, 9,012 kept; 789,395 training tokens in 6,444 rows of up to 512
"""

from llm.config import Config, default_config, with_variant


def get_config(variant: str = "") -> Config:
    """The whole corpus, or `smoke`: a small vocabulary (the first documents are all of one class)."""
    config = default_config("corpus")
    config.data.train = "r52/train"
    config.data.validation = "r52/test"
    config.data.label = "label"
    config.data.packing = "whole"
    config.data.row_length = 512
    config.data.buckets = (32, 64, 128, 256, 512)
    config.tokenizer.kind = "wordpiece"
    config.tokenizer.lowercase = True
    config.tokenizer.vocab_size = 8192
    config.objective.kind = "classification"
    return with_variant(config, variant, smoke={"tokenizer.vocab_size": 1000})
