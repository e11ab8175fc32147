"""Two tasks of one T5, told apart by a prefix: English to German and English to Chinese.

Text to text, as published: each source is read with its prefix, the vocabulary and all parameters are shared. BLEU and
chrF are of both languages together, Chinese split into characters; validation.jsonl has each translation by itself.

Command:   python -m llm.train --config=experiments/t5/translations.py --workdir=runs/t5-translations
Hardware:  two CPU cores
Time:      1 h 48 min beside other work, 1 h 36 min of it training at 328 tokens/s; an idle core has 1,400
Score:     it does not learn to translate: BLEU 0.04 (0.03 to 0.05), chrF 3.80, 5.60 nats a held-out token; one seed.
           With a rate of 3e-3 it was at 6.23 after 800 steps, this one at 6.08. The encoder-decoder of
           experiments/encdec/en_de.py was at 4.22 by then. Not tried: Adafactor, by which the T5 was published, whose
           steps are as large as the parameters; AdamW moves its token table, of deviation 1, little in 2,400 steps
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

    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 200
    config.generation.prompts = tuple(task + "Insert a new row" for task in (GERMAN, CHINESE))
    config.generation.temperature = 0.0
    return with_variant(config, variant, smoke=SMOKE)
