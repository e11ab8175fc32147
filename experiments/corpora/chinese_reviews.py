"""Chinese reviews of things bought, positive and negative.

Half of the lines stand twice, which would put most of the validation reviews into training. 47 texts stand among the
good and the bad ones: headings, and a bar of links of the site.

Command:   python -m llm.prepare --config=experiments/corpora/chinese_reviews.py --workdir=runs/chinese_reviews
Hardware:  two CPU cores
Time:      12 s
Result:    35,123 reviews read, 17,344 kept; 725,809 training tokens in 15,561 rows of up to 256
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
