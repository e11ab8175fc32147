"""The config of the tests' own runs: everything on, nothing large."""

from llm.config import Config, default_config, with_variant


def get_config(variant: str = "") -> Config:
    """A two-layer model with dropout, two micro-batches and frequent checkpoints, for the corpus of the tests."""
    config = default_config("gpt")
    config.data.holdout = ("part7",)
    config.data.row_length = 32
    config.tokenizer.vocab_size = 300
    config.model.context = 48
    config.model.layers = 2
    config.model.width = 32
    config.model.heads = 4
    config.model.kv_heads = 2
    config.model.dropout = 0.1
    config.training.steps = 24
    config.training.batch_size = 4
    config.training.microbatches = 2
    config.training.loss_chunk = 16
    config.training.log_every = 2
    config.training.validate_every = 10
    config.training.checkpoint_every = 4
    config.optimizer.warmup_steps = 4
    config.evaluation.batch_size = 16
    config.generation.prompts = ("She was", "He")
    config.generation.max_tokens = 8
    return with_variant(config, variant, smoke={"training.steps": 6})
