"""Chinese reviews of things bought, positive and negative.

Command:   python -m llm.prepare --config=experiments/corpora/chinese_reviews.py --workdir=runs/chinese_reviews
Hardware:  two CPU cores
Time:      TIME_chinese_reviews
Result:    RESULT_chinese_reviews
"""

from llm.config import Config, default_config, with_variant


def get_config(variant: str = "") -> Config:
    """The whole corpus, or `smoke`: a small vocabulary (the first documents are all of one class)."""
    config = default_config("corpus")
    config.data.train = "chinese_reviews"
    config.data.label = "label"
    config.data.packing = "whole"
    config.data.row_length = 256
    config.data.buckets = (16, 32, 64, 128, 256)
    config.tokenizer.vocab_size = 8192
    config.objective.kind = "classification"
    config.dedup.near = True
    config.clean.personal_data = ("email", "phone", "national_id")
    return with_variant(config, variant, smoke={"tokenizer.vocab_size": 1000})
