"""R8, the eight largest topics of Reuters-21578: labelled news with the usual split.

The test set stays whole (2,189 texts). Of training, 66 texts go that stand twice, five of them because they stand in
the test set; four texts of one line have two topics, "interest" and "money-fx", of which one is kept.

Command:   python -m llm.prepare --config=experiments/corpora/r8.py --workdir=runs/r8
Hardware:  two CPU cores
Time:      6 s
Result:    7,674 texts read, 7,608 kept; 618,266 training tokens in 5,419 rows of up to 512
"""

from llm.config import Config, default_config, with_variant


def get_config(variant: str = "") -> Config:
    """The whole corpus, or `smoke`: its first documents."""
    config = default_config("corpus")
    config.data.train = "r8/train"
    config.data.validation = "r8/test"
    config.data.label = "label"
    config.data.packing = "whole"
    config.data.row_length = 512
    config.data.buckets = (32, 64, 128, 256, 512)
    config.tokenizer.kind = "wordpiece"
    config.tokenizer.lowercase = True
    config.tokenizer.vocab_size = 8192
    config.objective.kind = "classification"
    return with_variant(config, variant, smoke={"data.max_documents": 200, "tokenizer.vocab_size": 1000})
