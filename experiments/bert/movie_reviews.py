"""Snippets of film reviews, positive or negative: the pre-trained encoder and a bag of words and pairs.

Command:   python -m llm.train --config=experiments/bert/movie_reviews.py --workdir=runs/bert-movie-reviews
Needs:     runs/bert-pretrain (experiments/bert/pretrain.py); the variant `scratch` does without
Hardware:  two CPU cores
Time:      not measured yet in full
Score:     not measured yet in full
"""

from experiments.bert.fine_tuning import SCRATCH, SMOKE, classifier
from llm.config import Config, with_variant


def get_config(variant: str = "") -> Config:
    """The full run; `scratch`, which trains encoder and tokenizer anew; or `smoke`."""
    config = classifier("movie_reviews", "", 96, (16, 32, 48, 64, 96), 900)
    config.model.bag_pairs = 2**16
    return with_variant(config, variant, smoke=SMOKE, scratch=SCRATCH)
