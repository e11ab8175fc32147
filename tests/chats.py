"""The configs of the tests' runs on conversations and on preferences: two layers that learn two dialogues by heart."""

from llm.config import Config, default_config

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' and not loop.first and messages[loop.index0 - 1].role == 'user' %}"
    "{{ raise_exception('two users in a row') }}{% endif %}<|turn|>{{ m.role }}:{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant:{% endif %}"
)


def get_config(variant: str = "") -> Config:
    """Conversations, or with the variant `preferences` pairs of answers; the data are the test's."""
    config = default_config("gpt")
    config.data.form = "preference" if variant == "preferences" else "chat"
    config.data.packing = "whole" if variant == "preferences" else "best_fit"
    config.data.row_length = 64
    config.tokenizer.vocab_size = 300
    config.tokenizer.special_tokens = ("<|turn|>", "<|end|>")
    config.tokenizer.chat_template = TEMPLATE
    config.objective.kind = "preference" if variant == "preferences" else "chat"
    config.model.context = 96
    config.model.layers = 2
    config.model.width = 32
    config.model.heads = 2
    config.model.attention = "reference"
    config.model.dropout = 0.0 if variant == "preferences" else 0.1
    config.training.steps = 12 if variant == "preferences" else 60
    config.training.batch_size = 4
    config.training.loss_chunk = 32
    config.training.log_every = 1
    config.training.validate_every = 6
    config.training.checkpoint_every = 6 if variant == "preferences" else 30
    config.optimizer.warmup_steps = 2
    config.optimizer.learning_rate = 3e-3 if variant == "preferences" else 2e-2
    config.optimizer.weight_decay = 0.0
    config.evaluation.batch_size = 4
    config.generation.max_tokens = 12
    return config
