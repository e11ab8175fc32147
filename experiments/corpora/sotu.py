"""State of the Union addresses since 1790, one document each (CC0).

An address is one line, so FineWeb's share of lines that end in a full stop is all or nothing: it would refuse twelve
that end in a quotation or a table. One is dropped, the fragment of 1932, which is mostly numbers.

Command:   python -m llm.prepare --config=experiments/corpora/sotu.py --workdir=runs/sotu
Hardware:  two CPU cores
Time:      13 s
Result:    233 speeches read, 232 kept; 1,985,110 training tokens in 3,878 rows of 512
"""

from llm.config import Config, default_config, with_variant


def get_config(variant: str = "") -> Config:
    """The whole corpus, or `smoke`: its first documents."""
    config = default_config("corpus")
    config.data.train = "sotu"
    config.data.row_length = 512
    config.tokenizer.vocab_size = 8192
    config.clean.languages = ("en",)
    # Not fineweb: an address is one line, and it refuses the twelve that end in a quotation or a table.
    config.clean.quality = ("gopher_quality", "gopher_repetition")
    config.dedup.near = True
    return with_variant(config, variant, smoke={"data.max_documents": 40, "tokenizer.vocab_size": 1000})
