"""Five novels of Jane Austen with a sixth held out: the corpus that is embedded.

Command:   python -m llm.prepare --config=experiments/corpora/austen.py --workdir=runs/austen
Hardware:  two CPU cores
Time:      TIME_austen
Result:    RESULT_austen
"""

from llm.config import Config, default_config, with_variant


def get_config(variant: str = "") -> Config:
    """The whole corpus, or `smoke`: its first documents."""
    config = default_config("corpus")
    config.data.train = "austen"
    config.data.holdout = ("persuasion",)
    config.data.packing = "best_fit"
    config.data.row_length = 256
    config.clean.quality = ("gopher_quality", "gopher_repetition", "fineweb")
    config.dedup.near = True
    config.dedup.document_paragraphs = True
    return with_variant(config, variant, smoke={"data.max_documents": 6, "tokenizer.vocab_size": 1000})
