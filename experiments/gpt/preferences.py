"""The small GPT that talks learns to prefer right answers to wrong ones (DPO: Rafailov et al. 2023).

Each pair has a right and a wrong answer to a question of experiments/gpt/chat.py: another novel, or the names of
another passage. What is held out there is held out here.
"""

from experiments.gpt import chat
from llm.config import Config, with_variant

START = "runs/chat"
# The shape of the main job's smoke, which this smoke starts from: run that first.
SMOKE_START = "runs/quickstart-smoke"
SMOKE = chat.SMOKE | {
    "tokenizer.path": f"{SMOKE_START}/tokenizer.json",
    "training.start_from": SMOKE_START,
}


def get_config(variant: str = "") -> Config:
    """The full run, or `smoke`: a few steps from runs/quickstart-smoke (experiments/quickstart.py:smoke)."""
    config = chat.get_config()
    config.data.train = "austen_preferences/train"
    config.data.validation = "austen_preferences/test"
    config.data.form = "preference"
    config.data.packing = "whole"
    config.data.row_length = 192  # both answers, each after the whole conversation
    config.objective.kind = "preference"
    config.tokenizer.path = f"{START}/tokenizer.json"

    config.training.start_from = START
    config.training.batch_size = 16
    config.training.steps = 60
    config.training.validate_every = 30
    config.training.checkpoint_every = 30
    config.optimizer.learning_rate = 3e-4
    config.optimizer.warmup_steps = 10
    config.optimizer.weight_decay = 0.0
    return with_variant(config, variant, smoke=SMOKE)
