"""What pre-training at the scale of the papers shares: bfloat16, rematerialisation, a sharded state, a token budget.

The data are the ones that ship; name your own before training. `llm.plan` says what a run would take.
"""

from typing import Any

from experiments.published import DATA
from experiments.published import SMOKE as TINY
from llm.config import Config, default_config, with_variant

CHUNKS = 8  # of the tokens of a batch, whose logits exist one after the other
SMOKE: dict[str, Any] = TINY | {
    "model.head_width": None,
    "model.ff_width": 64,
    "data.row_length": 64,
    "training.batch_size": 8,
    "training.loss_chunk": 128,
    "mesh.fsdp": 1,
    "mesh.tensor": 1,
}


def pretraining(family: str, preset: str, *, rows: int, length: int, tokens: float, rate: float) -> Config:
    """A config of a published size.

    Args:
        family, preset: as in `llm.models.PRESETS`; "" has the family's defaults.
        rows, length: of a batch, and the tokens of each.
        tokens: the budget, which says how many steps there are.
        rate: the peak learning rate.
    """
    config = with_variant(default_config(family, preset), "data", data=DATA[family])
    config.model.dtype = "bfloat16"
    config.model.remat = "all"
    config.data.row_length = length
    config.training.batch_size = rows
    config.training.steps = int(tokens // (rows * length))
    config.training.loss_chunk = rows * length // CHUNKS
    config.training.checkpoint_every = 1000
    config.training.validate_every = 1000
    config.optimizer.learning_rate = rate
    config.mesh.data = 1
    config.mesh.fsdp = -1
    return config
