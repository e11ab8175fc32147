"""100,000 sentences of the web, shuffled: English found, duplicates dropped, personal data replaced.

Command:   python -m llm.prepare --config=experiments/corpora/web_sentences.py --workdir=runs/web_sentences
Hardware:  two CPU cores
Time:      TIME_web_sentences
Result:    RESULT_web_sentences
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
