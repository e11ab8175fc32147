"""What the language models of Jane Austen's novels share with the main job, the GPT of experiments/quickstart.py.

They have its 1.3 million parameters, and steps that take its time: on one slow core it trains for 15 min 2 s, the LSTM
for 14 min 42 s, and the T5, by its rate of that day, for 15 min 3 s.
"""

from experiments import quickstart
from llm.config import Config, default_config

SMOKE = {name: value for name, value in quickstart.SMOKE.items() if name != "model.unroll"}


def novels(family: str) -> Config:
    """The config of a family, all but its model and its length that of the main job."""
    config, job = default_config(family), quickstart.get_config()
    for room in ("data", "tokenizer", "optimizer", "training", "generation"):
        config[room].update(job[room].to_dict())
    return config
