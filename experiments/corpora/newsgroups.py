"""20 Newsgroups: labelled posts with the usual split.

Command:   python -m llm.prepare --config=experiments/corpora/newsgroups.py --workdir=runs/newsgroups
Hardware:  two CPU cores
Time:      TIME_newsgroups
Result:    RESULT_newsgroups
"""

from llm.config import Config, default_config, with_variant


def get_config(variant: str = "") -> Config:
    """The whole corpus, or `smoke`: a small vocabulary (the first documents are all of one class)."""
    config = default_config("corpus")
    config.data.train = "20ng/train"
    config.data.validation = "20ng/test"
    config.data.label = "label"
    config.data.packing = "whole"
    config.data.row_length = 512
    config.data.buckets = (64, 128, 256, 512)
    config.tokenizer.kind = "wordpiece"
    config.tokenizer.lowercase = True
    config.tokenizer.vocab_size = 16384
    config.objective.kind = "classification"
    return with_variant(config, variant, smoke={"tokenizer.vocab_size": 1000})
