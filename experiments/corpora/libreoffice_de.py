"""English and German, sentence by sentence: the messages of LibreOffice.

Marks of keyboard shortcuts are not language. One pair in fifteen is another but for case and punctuation, "Name" and
"Name:", and goes; the same English always falls on one side of the split.

Command:   python -m llm.prepare --config=experiments/corpora/libreoffice_de.py --workdir=runs/libreoffice_de
Hardware:  two CPU cores
Time:      4 s
Result:    19,160 pairs read, 17,905 kept; 309,420 training tokens in 17,055 rows of up to 128
"""

from llm.config import Config, default_config, with_variant

SMOKE = {"data.max_documents": 200, "tokenizer.vocab_size": 1000}


def get_config(variant: str = "") -> Config:
    """The whole corpus, or `smoke`: its first documents."""
    config = default_config("corpus")
    config.data.train = "libreoffice_en_de"
    config.data.fields = ("text", "target")
    config.data.packing = "whole"
    config.data.row_length = 128
    config.data.buckets = (8, 16, 32, 64, 128)
    config.data.validation_fraction = 0.05
    config.tokenizer.kind = "unigram"
    config.tokenizer.vocab_size = 8000
    config.objective.kind = "seq2seq"
    return with_variant(config, variant, smoke=SMOKE)
