"""English and Chinese, sentence by sentence: the messages of LibreOffice.

Chinese puts the letter of a keyboard shortcut in brackets behind the words. One pair in nineteen is another but for
case and punctuation, "Name" and "Name:", and goes; the same English always falls on one side of the split.

Command:   python -m llm.prepare --config=experiments/corpora/libreoffice_zh.py --workdir=runs/libreoffice_zh
Hardware:  two CPU cores
Time:      4 s
Result:    19,065 pairs read, 18,035 kept; 253,787 training tokens in 17,174 rows of up to 128
"""

from experiments.corpora import libreoffice_de
from llm.config import Config, with_variant


def get_config(variant: str = "") -> Config:
    """The whole corpus, or `smoke`: its first documents."""
    config = libreoffice_de.get_config()
    config.data.train = "libreoffice_en_zh"
    return with_variant(config, variant, smoke=libreoffice_de.SMOKE)
