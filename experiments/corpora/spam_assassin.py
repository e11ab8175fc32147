"""Mails of SpamAssassin, spam and ham: real personal data, real mojibake, real HTML.

Command:   python -m llm.prepare --config=experiments/corpora/spam_assassin.py --workdir=runs/spam_assassin
Hardware:  two CPU cores
Time:      TIME_spam_assassin
Result:    RESULT_spam_assassin
"""

from llm.config import Config, default_config, with_variant


def get_config(variant: str = "") -> Config:
    """The whole corpus, or `smoke`: a small vocabulary (the first documents are all of one class)."""
    config = default_config("corpus")
    config.data.train = "spam_assassin"
    config.data.label = "label"
    config.data.packing = "whole"
    config.data.row_length = 1024
    config.data.buckets = (128, 256, 512, 1024)
    config.tokenizer.vocab_size = 8192
    config.clean.markup = True
    config.clean.personal_data = ("email", "ip", "phone", "card", "national_id")
    config.dedup.near = True
    config.objective.kind = "classification"
    return with_variant(config, variant, smoke={"tokenizer.vocab_size": 1000})
