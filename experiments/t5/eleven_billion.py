"""T5-11B (Raffel et al. 2020): spans of 568 tokens hidden, a million steps of 2,048 rows.

Published with Adafactor; AdamW, which this takes, keeps two moments of every parameter.

Command:   python -m llm.plan --config=experiments/t5/eleven_billion.py --topology=v5e:16x16
           python -m llm.train --config=experiments/t5/eleven_billion.py --workdir=runs/t5-11b \
               --config.data.train=my/texts
Hardware:  a pod; the variant `smoke` runs on two CPU cores
Time:      `llm.plan` bounds it; benchmarks/README.md has the page
Score:     none is claimed: it has not been trained
"""

from experiments.pretraining import SMOKE, pretraining
from llm.config import Config, with_variant


def get_config(variant: str = "") -> Config:
    """The full run, or `smoke`."""
    config = pretraining("t5", "11b", rows=2048, length=568, tokens=1e6 * 2048 * 568, rate=1e-3)
    config.tokenizer.vocab_size = 32128
    config.optimizer.schedule = "inverse_sqrt"
    config.optimizer.warmup_steps = 10_000
    config.mesh.fsdp = 64
    config.mesh.tensor = -1
    return with_variant(config, variant, smoke=SMOKE)
