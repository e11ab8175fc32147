"""English to Chinese: the messages of LibreOffice, by a small Transformer.

Command:   python -m llm.train --config=experiments/encdec/en_zh.py --workdir=runs/en-zh
Hardware:  two CPU cores
Time:      28 min 34 s on one slow core, 24 min 42 s of it training; 2,845,440 parameters
Score:     BLEU 8.36 (6.96 to 10.27) and chrF 9.50 on 861 held-out pairs by one seed, perplexity 36.9, 5.9 % exact: far
           behind the translation memory's 35.52 and 33.93
"""

from experiments.encdec.translation import PUBLISHED, SMOKE, translation
from llm.config import Config, with_variant


def get_config(variant: str = "") -> Config:
    """The full run; `published`, the published recipe; or `smoke`: its first pairs, a few steps."""
    config = translation("libreoffice_en_zh", "zh")
    config.generation.prompts = ("Save the file?", "Insert a new row", "The document cannot be opened.")
    config.generation.temperature = 0.0
    return with_variant(config, variant, smoke=SMOKE | {"tokenizer.vocab_size": 2000}, published=PUBLISHED)
