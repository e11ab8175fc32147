"""R52, 52 topics of Reuters-21578: labelled news with the usual split.

Command:   python -m llm.prepare --config=experiments/corpora/r52.py --workdir=runs/r52
Hardware:  two CPU cores
Time:      TIME_r52
Result:    RESULT_r52
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
