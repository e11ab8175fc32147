"""The quickstart without a tokenizer to train: one token a byte, longer rows, local attention; a config on a config.

Command:   python -m llm.train --config=experiments/gpt/bytes.py --workdir=runs/bytes
Hardware:  two CPU cores
Time:      6 min 25 s; 820,736 parameters
Score:     1.886 bits per byte on Persuasion; nanoGPT's CPU recipe, of characters, has 2.206 (benchmarks/README.md)
"""

from experiments import quickstart
from llm.config import Config, with_variant


def get_config(variant: str = "") -> Config:
    """The full run, or `smoke`: the same path in a few steps."""
    config = quickstart.get_config()
    config.tokenizer.kind = "bytes"
    config.data.row_length = 256
    config.model.context = 256
    config.model.windows = (64,)
    config.generation.max_tokens = 200
    return with_variant(config, variant, smoke={**quickstart.SMOKE, "generation.max_tokens": 32})
