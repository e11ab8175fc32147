"""A scaling ladder."""

from llm.config import Config, default_config, with_variant
from llm.sweeps import Setting, grid

BASE, LAYERS, LENGTH, RATE = 32, 2, 128, 2.0**-6
WIDTHS = (16, 24, 32, 40, 48, 64)
LONG_WIDTHS = (36, 52, 80, 128, 208, 352)
TOKENS_A_PARAMETER = 5
RATES = tuple(2.0**-n for n in (9, 8, 7, 6, 5))


def parameters(width: int) -> int:
    """Those of the blocks' matrices, without the table: 12 D^2 a layer."""
    return 12 * LAYERS * width**2


def get_config(variant: str = "") -> Config:
    """The model of the base width."""
    config = default_config("gpt")
    config.data.train = "austen"
    config.data.split_by = "tail"
    config.data.validation_fraction = 0.01
    config.data.row_length = LENGTH
    config.tokenizer.kind = "bytes"
    config.tokenizer.vocab_size = 257

    config.model.context = LENGTH
    config.model.layers = LAYERS
    config.model.width = BASE
    config.model.width_base = BASE
    config.model.heads = 4
    config.model.scale_embedding = True
    config.model.unroll = LAYERS

    config.training.steps = 240
    config.training.batch_size = 4
    config.training.log_every = 10
    config.training.validate_every = 100_000
    config.training.checkpoint_every = 100_000
    config.training.keep_checkpoints = 1
    config.optimizer.learning_rate = RATE
    config.optimizer.warmup_steps = 24
    config.optimizer.final_fraction = 0.0
    config.optimizer.weight_decay = 0.0
    config.evaluation.batch_size = 64
    return with_variant(
        config,
        variant,
        long={},
        rates={"training.batch_size": 8, "training.steps": 150, "optimizer.warmup_steps": 15},
        smoke={"training.steps": 10, "optimizer.warmup_steps": 2},
    )


def sweep(variant: str = "") -> list[Setting]:
    """The rungs; of `rates`, learning rates at three widths with muP and without; of `smoke`, three tiny rungs."""
    if variant == "rates":
        widths = (BASE, 2 * BASE, 4 * BASE)
        carried = grid({"model.width": widths, "optimizer.learning_rate": RATES})
        # At the base width both are the same model.
        other = grid({"model.width": widths[1:], "optimizer.learning_rate": RATES})
        return carried + [Setting(f"standard,{s.name}", s.fields | {"model.width_base": None}) for s in other]
    return [_rung(width) for width in (LONG_WIDTHS if variant == "long" else WIDTHS)]


def _rung(width: int) -> Setting:
    steps = round(TOKENS_A_PARAMETER * parameters(width) / (4 * LENGTH))
    fields = {"model.width": width, "training.steps": steps, "optimizer.warmup_steps": steps // 10}
    return Setting(f"width={width}", fields)
