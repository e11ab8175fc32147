"""The small GPT that talks learns to prefer right answers to wrong ones (DPO: Rafailov et al. 2023).

Each pair has a right and a wrong answer to a question of experiments/gpt/chat.py: another novel, or the names of
another passage. What is held out there is held out here.

Command:   python -m llm.train --config=experiments/gpt/preferences.py --workdir=runs/preferences
Needs:     runs/chat (experiments/gpt/chat.py); of the smoke, runs/quickstart-smoke (experiments/quickstart.py:smoke)
Hardware:  two CPU cores
Time:      14 min 17 s on a share of a core that a dozen processes asked for, of it 5 min 6 s training and 3 min 48 s
           log-probabilities of the start; 1,312,128 parameters
Score:     60.66 % (55.15 to 66.18) of 272 held-out pairs are preferred the right way round, margin 0.110, one seed; the
           start prefers none (its margins are 0), and two fifths of 2,463 pairs are seen once. 321 of 3,056 pairs are
           longer than a row and left out
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
