"""The main job: a small GPT on five novels of Jane Austen, judged on a sixth.

Command:   python -m llm.train --config=experiments/quickstart.py --workdir=runs/quickstart
Hardware:  two CPU cores
Time:      4 min 17 s, of it 4 min 2 s training; on cores less than half as fast, 10 min 3 s; 1,312,128 parameters
Score:     1.685 bits per byte on Persuasion (validation loss 4.16 nats a token), by two other seeds, on one core in
           11 min 55 s and 12 min 45 s of training, 1.679 and 1.683; nanoGPT's CPU recipe has 2.206 on the
           same text (benchmarks/README.md)
"""

from llm.config import Config, default_config, with_variant

SMOKE = {
    "tokenizer.vocab_size": 512,
    "model.layers": 2,
    "model.width": 64,
    "model.unroll": 2,
    "training.steps": 20,
    "training.validate_every": 10,
    "training.checkpoint_every": 10,
    "optimizer.warmup_steps": 5,
    "generation.max_tokens": 16,
}


def get_config(variant: str = "") -> Config:
    """The full run, or `smoke`: the same path in a few steps."""
    config = default_config("gpt")
    config.data.train = "austen"
    config.data.holdout = ("persuasion",)
    config.data.row_length = 128
    config.tokenizer.vocab_size = 4096

    config.model.context = 128
    config.model.layers = 4
    config.model.width = 128
    config.model.heads = 4
    config.model.activation = "relu2"
    config.model.qk_norm = True
    config.model.scale_embedding = True
    config.model.unroll = 4

    config.training.steps = 2200
    config.training.batch_size = 8
    config.training.validate_every = 400
    config.training.checkpoint_every = 400
    config.optimizer.learning_rate = 3.5e-3
    config.optimizer.warmup_steps = 50
    config.optimizer.final_fraction = 0.0
    config.optimizer.b2 = 0.99
    config.optimizer.weight_decay = 0.4

    config.generation.prompts = ("It was a truth", "Anne could not", '"My dear')
    config.generation.max_tokens = 80
    return with_variant(config, variant, smoke=SMOKE)
