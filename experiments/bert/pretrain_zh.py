"""A small BERT pre-trained on the Chinese text at hand: masked words and next sentences.

The reviews without those that experiments/bert/chinese_reviews.py holds out, and a month of the People's Daily.

Command:   python -m llm.train --config=experiments/bert/pretrain_zh.py --workdir=runs/bert-pretrain-zh
Hardware:  two CPU cores
Time:      26 min 29 s on one slow core beside other runs, 22 min 31 s of it training; 1,504,002 parameters, 3,653,417
           tokens
Score:     7.29 nats a masked token on held-out texts, perplexity 1,461: little; what it is worth stands in
           experiments/bert/chinese_reviews.py
"""

from experiments.bert import pretrain
from llm.config import Config, with_variant


def get_config(variant: str = "") -> Config:
    """The full run, or `smoke`: a part of one corpus, a few steps."""
    config = pretrain.get_config()
    config.data.train = "chinese_reviews"
    config.data.more = ("peoples_daily",)
    config.dedup.near = True
    config.dedup.contamination = ()
    config.clean.personal_data = ("email", "phone", "national_id")
    config.tokenizer.kind = "unigram"
    config.tokenizer.lowercase = False
    config.tokenizer.special_tokens = ("[CLS]", "[SEP]", "[MASK]")
    return with_variant(config, variant, smoke=pretrain.SMOKE | {"tokenizer.vocab_size": 3000})
