"""The People's Daily of January 1998: Chinese news, split into words by its editors, rejoined here.

Identification takes one article in twenty-five of plain Mandarin for Wu or Cantonese. No two of the articles are
alike; laws of one form share two thirds.

Command:   python -m llm.prepare --config=experiments/corpora/peoples_daily.py --workdir=runs/peoples_daily
Hardware:  two CPU cores
Time:      10 s
Result:    3,167 articles read, 3,167 kept; 1,134,929 training tokens in 2,218 rows of 512
"""

from llm.config import Config, default_config, with_variant


def get_config(variant: str = "") -> Config:
    """The whole corpus, or `smoke`: its first documents."""
    config = default_config("corpus")
    config.data.train = "peoples_daily"
    config.data.row_length = 512
    config.data.packing = "best_fit"
    config.tokenizer.vocab_size = 8192
    # One article in twenty-five of plain Mandarin is taken for Wu, a few for Cantonese.
    config.clean.languages = ("zh", "wuu", "yue")
    config.clean.language_confidence = 0.3  # where it wavers between them
    config.clean.personal_data = ("email", "phone", "national_id")
    config.dedup.near = True
    return with_variant(config, variant, smoke={"data.max_documents": 200, "tokenizer.vocab_size": 1000})
