"""What the three language models of Jane Austen's novels have in common: five novels to learn, a sixth to be judged on.

They have 1.3 million parameters each and train for the same time, which `training.steps` of each file gives on two
cores; their scores stand side by side in experiments/README.md.
"""

from typing import Any

from llm.config import Config, default_config

SMOKE: dict[str, Any] = {
    "tokenizer.vocab_size": 512,
    "model.layers": 2,
    "model.width": 64,
    "training.steps": 20,
    "training.validate_every": 10,
    "training.checkpoint_every": 10,
    "optimizer.warmup_steps": 5,
    "generation.max_tokens": 16,
}


def novels(family: str) -> Config:
    """The config of a family, its model left to say."""
    config = default_config(family)
    config.data.train = "austen"
    config.data.holdout = ("persuasion",)
    config.data.row_length = 128
    config.tokenizer.vocab_size = 4096
    config.training.validate_every = 400
    config.training.checkpoint_every = 400
    config.optimizer.warmup_steps = 50
    config.optimizer.final_fraction = 0.0
    config.optimizer.b2 = 0.99
    config.generation.prompts = ("It was a truth", "Anne could not", '"My dear')
    config.generation.max_tokens = 80
    return config
