"""100,000 sentences of the web, shuffled: English found, duplicates dropped, personal data replaced.

A sentence is little to tell a language by: asked for English at a probability of one half, four thousand go, nearly
all of them English: names, slang, headlines. So Pidgin counts as English, and a low probability is enough. Of the 666
that still go, as most like one of seventy other languages, a hundred are in one.

Command:   python -m llm.prepare --config=experiments/corpora/web_sentences.py --workdir=runs/web_sentences
Hardware:  two CPU cores
Time:      17 s
Result:    100,000 sentences read, 98,281 kept; 2,171,103 training tokens in 17,011 rows of 128
"""

from llm.config import Config, default_config, with_variant


def get_config(variant: str = "") -> Config:
    """The whole corpus, or `smoke`: its first documents."""
    config = default_config("corpus")
    config.data.train = "web_sentences"
    config.data.row_length = 128
    config.data.packing = "best_fit"
    config.tokenizer.vocab_size = 8192
    # A sentence is little to tell a language by: slang, names and headlines are taken for Pidgin and fifty others.
    config.clean.languages = ("en", "pcm")
    config.clean.language_confidence = 0.02
    config.clean.personal_data = ("email", "ip", "phone", "card", "national_id")
    config.clean.min_characters = 10
    config.dedup.near = True
    config.dedup.shingle = 3
    return with_variant(config, variant, smoke={"data.max_documents": 2000, "tokenizer.vocab_size": 1000})
