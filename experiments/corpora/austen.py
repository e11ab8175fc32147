"""Five novels of Jane Austen with a sixth held out: the corpus that is embedded.

Rules made for web pages refuse novels: a maximum of 100,000 words, lines that end as sentences do.

Command:   python -m llm.prepare --config=experiments/corpora/austen.py --workdir=runs/austen
Hardware:  two CPU cores
Time:      4 s
Result:    6 novels read, 6 kept; 944,517 training tokens in 3,690 rows of 256
"""

from llm.config import Config, default_config, with_variant


def get_config(variant: str = "") -> Config:
    """The whole corpus, or `smoke`: its first documents."""
    config = default_config("corpus")
    config.data.train = "austen"
    config.data.holdout = ("persuasion",)
    config.data.row_length = 256
    # Rules made for web pages refuse novels: gopher_quality what is longer than 100,000 words, fineweb lines that end
    # inside a sentence.
    config.dedup.near = True
    return with_variant(config, variant, smoke={"data.max_documents": 6, "tokenizer.vocab_size": 1000})
