"""English to German: the messages of LibreOffice, by a small Transformer.

Command:   python -m llm.train --config=experiments/encdec/en_de.py --workdir=runs/en-de
Hardware:  two CPU cores
Time:      28 min 47 s on one slow core, 24 min 51 s of it training; 2,845,440 parameters
Score:     BLEU 2.58 (2.02 to 3.23) and chrF 19.43 on 850 held-out pairs by one seed, perplexity 27.6: far behind the
           translation memory's 28.64 and 49.04. Many translations repeat a word to their end; 2 % are exact

Four and a half passes over 17,055 pairs are few: with three times the steps (--config.training.steps=7200) they are
6.54 and 26.20, 6.5 % exact, perplexity 18.0, after 85 minutes beside other work. What helps: pre-norm, a linear
schedule, small batches and less dropout, changed together: after 25,600 pairs they are at 4.13 nats a token on held-out
pairs, where `published`, three layers and in five buckets, was at 4.50 after 128,000.
"""

from experiments.encdec.translation import PUBLISHED, SMOKE, translation
from llm.config import Config, with_variant


def get_config(variant: str = "") -> Config:
    """The full run; `published`, the published recipe; or `smoke`: its first pairs, a few steps."""
    config = translation("libreoffice_en_de", "de")
    config.generation.prompts = ("Save the file?", "Insert a new row", "The document cannot be opened.")
    config.generation.temperature = 0.0
    return with_variant(config, variant, smoke=SMOKE, published=PUBLISHED)
