"""English and Chinese, sentence by sentence: the messages of LibreOffice.

Command:   python -m llm.prepare --config=experiments/corpora/libreoffice_zh.py --workdir=runs/libreoffice_zh
Hardware:  two CPU cores
Time:      TIME_libreoffice_zh
Result:    RESULT_libreoffice_zh
"""

from llm.config import Config, default_config, with_variant


def get_config(variant: str = "") -> Config:
    """The whole corpus, or `smoke`: its first documents."""
    config = default_config("corpus")
    config.data.train = "libreoffice_en_zh"
    config.data.fields = ("text", "target")
    config.data.packing = "whole"
    config.data.row_length = 128
    config.data.buckets = (8, 16, 32, 64, 128)
    config.data.validation_fraction = 0.05
    config.tokenizer.kind = "unigram"
    config.tokenizer.vocab_size = 8000
    config.objective.kind = "seq2seq"
    return with_variant(config, variant, smoke={"data.max_documents": 200, "tokenizer.vocab_size": 1000})
