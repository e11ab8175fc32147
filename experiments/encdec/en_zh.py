"""English to Chinese: the messages of LibreOffice, by a small Transformer.

Command:   python -m llm.train --config=experiments/encdec/en_zh.py --workdir=runs/en-zh
Hardware:  two CPU cores
Time:      not measured yet in full
Score:     not measured yet in full
"""

from experiments.encdec.translation import PUBLISHED, SMOKE, translation
from llm.config import Config, with_variant


def get_config(variant: str = "") -> Config:
    """The full run; `published`, the published recipe; or `smoke`: its first pairs, a few steps."""
    config = translation("libreoffice_en_zh", "zh")
    config.generation.prompts = ("Save the file?", "Insert a new row", "The document cannot be opened.")
    config.generation.temperature = 0.0
    return with_variant(config, variant, smoke=SMOKE | {"tokenizer.vocab_size": 2000}, published=PUBLISHED)
