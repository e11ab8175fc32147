"""Two tasks of one T5, told apart by a prefix: English to German and English to Chinese.

Text to text, as published: each source is read with its prefix, the vocabulary and all parameters are shared. BLEU and
chrF are of both languages together, Chinese split into characters; validation.jsonl has each translation by itself.

Command:   python -m llm.train --config=experiments/t5/translations.py --workdir=runs/t5-translations
Hardware:  two CPU cores
Time:      28 min 48 s on one core, of it 23 min 17 s training at 1,351 tokens/s; 3,308,032 parameters
Score:     4.89 nats a held-out token, BLEU 0.17 (0.12 to 0.22), chrF 4.59; one seed. It answers in the language asked
           for and does not translate: "Insert a new row" becomes "Wählen Sie die oder oder oder". The token table, of
           deviation 1, is why it takes 14 times the rate, sqrt(D): at the rate of the rest AdamW moves it so little
           that 5.60 nats was all it came to. Of the peak, after 400 steps: 1e-3 was at 5.59, 3e-3 at 5.88. The
           encoder-decoder of experiments/encdec/en_de.py was at 4.22 after 800
Peer:      a translation memory (benchmarks/README.md) has BLEU 28.64 and chrF 49.04 to German, 35.52 and 33.93 to
           Chinese
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
    config.optimizer.rates = ("embedding=14",)  # sqrt(D)
    config.generation.prompts = tuple(task + "Insert a new row" for task in (GERMAN, CHINESE))
    config.generation.temperature = 0.0
    return with_variant(config, variant, smoke=SMOKE)
