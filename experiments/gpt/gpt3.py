"""The eight sizes of GPT-3 (Brown et al. 2020, table 2.1): `:small`, `:medium` ... `:175b`, 300 billion tokens each.

Learning rates are the table's, and batches the nearest to it of 2^n or 3 x 2^n rows, which a mesh divides; the warm-up
is the paper's 375 million tokens, the decay takes the whole run. The vocabulary of 50,257 is padded to 50,304, which a
mesh divides too. Data are the novels that ship: name your own before training one of them.

Command:   python -m llm.plan --config=experiments/gpt/gpt3.py:175b --topology=v5p:8x8x16 --config.mesh.fsdp=128 \
               --config.mesh.tensor=8
           python -m llm.train --config=experiments/gpt/gpt3.py:small --workdir=runs/gpt3-small \
               --config.data.train=my/texts
Hardware:  from a few GPUs (small) to a pod (175b); the variant `smoke`, a small one made tiny, runs on two CPU cores
Time:      `llm.plan` bounds it; benchmarks/README.md has the page of 175b
Score:     none is claimed: none has been trained
"""

from typing import NamedTuple

from experiments.pretraining import SMOKE, pretraining
from llm.config import Config, with_variant
from llm.errors import InputError


class Size(NamedTuple):
    """A row of the table: rows of 2,048 tokens in a batch, and the peak learning rate."""

    rows: int
    rate: float


SIZES = {
    "small": Size(256, 6e-4),
    "medium": Size(256, 3e-4),
    "large": Size(256, 2.5e-4),
    "xl": Size(512, 2e-4),
    "2.7b": Size(512, 1.6e-4),
    "6.7b": Size(1024, 1.2e-4),
    "13b": Size(1024, 1e-4),
    "175b": Size(1536, 0.6e-4),
}
LENGTH, TOKENS, WARMUP = 2048, 300e9, 375e6


def get_config(variant: str = "small") -> Config:
    """The config of a size, or `smoke`."""
    name = "small" if variant in ("", "smoke") else variant
    if name not in SIZES:
        raise InputError(f"unknown variant {variant!r}; there are {', '.join([*SIZES, 'smoke'])}")
    size = SIZES[name]
    config = pretraining("gpt", f"gpt3-{name}", rows=size.rows, length=LENGTH, tokens=TOKENS, rate=size.rate)
    config.model.vocab_size = 50304
    config.tokenizer.vocab_size = 50257
    config.optimizer.warmup_steps = int(WARMUP // (size.rows * LENGTH))
    return with_variant(config, "smoke" if variant == "smoke" else "", smoke=SMOKE)
