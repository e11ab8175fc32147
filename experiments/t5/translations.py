"""Two tasks of one T5, told apart by a prefix: English to German and English to Chinese.

Text to text, as published: each source is read with its prefix, the vocabulary and all parameters are shared. BLEU and
chrF are of both languages together, Chinese split into characters; validation.jsonl has each translation by itself.

Command:   python -m llm.train --config=experiments/t5/translations.py --workdir=runs/t5-translations
Hardware:  two CPU cores
Time:      not run in full
Score:     not run in full: after 800 of 2,400 steps, 20 minutes on one slow core, it was at 6.23 nats a held-out token
           with gradients of norm up to 54; the rate of the other translations looks too high for it
"""

from experiments.encdec.translation import SMOKE as TRANSLATION
from experiments.encdec.translation import translation
from llm.config import Config, with_variant

SMOKE = TRANSLATION | {"tokenizer.vocab_size": 2000}
GERMAN, CHINESE = "translate English to German: ", "translate English to Chinese: "


def get_config(variant: str = "") -> Config:
    """The full run, or `smoke`: its first pairs, a few steps."""
    config = translation("libreoffice_en_de", "zh", family="t5")
    config.data.more = ("libreoffice_en_zh",)
    config.data.prefixes = (GERMAN, CHINESE)
    config.tokenizer.vocab_size = 8000

    config.model.ff_width = 384
    config.model.activation = "gelu_tanh"
    config.model.gated = True
    config.model.dropout = 0.1

    config.generation.prompts = tuple(task + "Insert a new row" for task in (GERMAN, CHINESE))
    config.generation.temperature = 0.0
    return with_variant(config, variant, smoke=SMOKE)
