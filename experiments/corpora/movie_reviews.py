"""Snippets of movie reviews, positive and negative.

Labels are those of the review that a snippet was taken from: the rating of the snippet has the other sign in 310.
No two are alike, none is longer than a row.

Command:   python -m llm.prepare --config=experiments/corpora/movie_reviews.py --workdir=runs/movie_reviews
Hardware:  two CPU cores
Time:      3 s
Result:    10,312 snippets read, 10,312 kept; 240,698 training tokens in 9,263 rows of up to 96
"""

from llm.config import Config, default_config, with_variant


def get_config(variant: str = "") -> Config:
    """The whole corpus, or `smoke`: a small vocabulary (the first documents are all of one class)."""
    config = default_config("corpus")
    config.data.train = "movie_reviews"
    config.data.label = "label"
    config.data.packing = "whole"
    config.data.row_length = 96
    config.data.buckets = (16, 32, 48, 64, 96)
    config.tokenizer.kind = "wordpiece"
    config.tokenizer.lowercase = True
    config.tokenizer.vocab_size = 8192
    config.objective.kind = "classification"
    config.objective.augment = ("swap", "delete")
    return with_variant(config, variant, smoke={"tokenizer.vocab_size": 1000})
