"""A GPT of 4.97 billion parameters for a pod of 256 TPU v5e: 24 layers, width 4,096, rows of 2,048.

Command:   python -m llm.plan --config=experiments/gpt/five_billion.py --topology=v5e:16x16
           python -m llm.train --config=experiments/gpt/five_billion.py --workdir=runs/gpt-5b \
               --config.data.train=my/texts
Hardware:  256 TPU v5e; the variant `smoke` runs on two CPU cores
Time:      `llm.plan` bounds it; benchmarks/README.md has the page
Score:     none is claimed: it has not been trained
"""

from experiments.pretraining import SMOKE, pretraining
from llm.config import Config, with_variant


def get_config(variant: str = "") -> Config:
    """The full run, a hundred billion tokens, or `smoke`."""
    config = pretraining("gpt", "", rows=256, length=2048, tokens=100e9, rate=1.2e-4)
    config.model.vocab_size = 32768
    config.model.context = 2048
    config.model.layers = 24
    config.model.width = 4096
    config.model.heads = 32
    config.model.ff_width = 16384
    config.tokenizer.vocab_size = 32768
    config.optimizer.warmup_steps = 700
    config.mesh.fsdp = 64
    config.mesh.tensor = -1
    return with_variant(config, variant, smoke=SMOKE)
