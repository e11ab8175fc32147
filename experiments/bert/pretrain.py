"""A small BERT pre-trained on the English text at hand: masked words and next sentences.

News, newsgroups, film reviews and web sentences, none of which stands in the test sets of the classification
experiments: texts that share 13 words with one are taken out.

Command:   python -m llm.train --config=experiments/bert/pretrain.py --workdir=runs/bert-pretrain
Hardware:  two CPU cores
Time:      13 min 46 s on one slow core, 12 min 31 s of it training; 1,504,002 parameters, 2,015,561 tokens
Score:     6.97 nats a masked token on held-out texts, perplexity 1,068: little, and yet worth four points of accuracy
           to experiments/bert/movie_reviews.py
"""

from experiments.bert.small import small_bert
from llm.config import Config, with_variant

SMOKE = {
    "data.more": (),
    "data.max_documents": 300,
    "data.row_length": 64,
    "data.buckets": (64,),
    "dedup.contamination": (),
    "tokenizer.vocab_size": 1000,
    "model.layers": 2,
    "model.width": 32,
    "model.heads": 2,
    "training.steps": 20,
    "training.batch_size": 16,
    "training.microbatches": 2,
    "training.validate_every": 10,
    "training.checkpoint_every": 20,
    "optimizer.warmup_steps": 5,
}


def get_config(variant: str = "") -> Config:
    """The full run, or `smoke`: a part of one corpus, a few steps."""
    config = small_bert(2000)
    config.data.train = "r52/train"
    config.data.more = ("20ng/train", "movie_reviews", "web_sentences")
    config.data.row_length = 128
    config.data.buckets = (32, 64, 128)
    config.data.validation_fraction = 0.1  # by the same hash as in movie_reviews.py: its held-out texts stay unseen
    config.dedup.contamination = ("r8/test", "r52/test", "20ng/test")
    config.tokenizer.kind = "wordpiece"
    config.tokenizer.lowercase = True
    config.tokenizer.vocab_size = 8192
    config.objective.kind = "masked"
    config.objective.next_sentence = True

    config.model.dropout = 0.0

    config.training.batch_size = 32
    config.training.microbatches = 4  # smaller parts stay in cache: a third faster on CPU
    config.training.loss_chunk = 256
    config.training.validate_every = 500
    config.training.checkpoint_every = 500
    config.evaluation.batch_size = 128
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 200
    config.optimizer.weight_decay = 0.01
    return with_variant(config, variant, smoke=SMOKE)
