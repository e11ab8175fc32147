"""A small GPT learns to talk: two questions about a passage of Jane Austen, which novel it is from and who is named.

Supervised fine-tuning of experiments/quickstart.py on conversations (llm/data/dialogues.py): only what the assistant
says is learned. One passage of ten is held out.

Command:   python -m llm.train --config=experiments/gpt/chat.py --workdir=runs/chat
Needs:     runs/quickstart; the score is from one of 700 steps (--config.training.steps=700), at 1.861 bits per byte
Hardware:  two CPU cores
Time:      13 min on a share of a core that a dozen processes asked for, of it 5 min 19 s training; 1,312,128 parameters
Score:     0.775 nats a token of held-out answers; 29.80 % (26.38 to 33.55) of 614 answers are right to the letter, one
           seed, a pass over the passages

So short a run learns the form of the answers and when to stop, not to read: it says "Emma." to every first question,
27.0 % of them right, and "Nobody." to every second, 32.6 %, the most frequent answers. A longer one was not measured.
"""

from experiments import quickstart
from llm.config import Config, with_variant

START = "runs/quickstart"
# The end of text closes each turn: the tokenizer of the start has no other special token.
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}:\n{{ message.content }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)
SMOKE = quickstart.SMOKE | {
    "data.max_documents": 200,
    "tokenizer.path": "",
    "training.start_from": "",
    "generation.max_tokens": 4,
}


def get_config(variant: str = "") -> Config:
    """The full run, or `smoke`: a few steps from nothing."""
    config = quickstart.get_config()
    config.data.train = "austen_chats/train"
    config.data.validation = "austen_chats/test"
    config.data.holdout = ()
    config.data.form = "chat"
    config.data.packing = "best_fit"
    config.tokenizer.path = f"{START}/tokenizer.json"
    config.tokenizer.chat_template = TEMPLATE
    config.objective.kind = "chat"
    config.data.row_length = 192  # two of most conversations
    config.model.context = 192

    config.training.start_from = START
    config.training.loss_chunk = 64  # one place in nine is learned: the others' logits are left out
    config.training.steps = 150
    config.training.validate_every = 100
    config.training.checkpoint_every = 100
    config.evaluation.batch_size = 64
    config.optimizer.learning_rate = 1.5e-3
    config.optimizer.warmup_steps = 20
    config.optimizer.weight_decay = 0.1
    config.generation.prompts = ('"Oh! Mr. Knightley, I am so happy!" cried Harriet.\nWhich novel is this from?',)
    config.generation.temperature = 0.0
    config.generation.max_tokens = 24
    return with_variant(config, variant, smoke=SMOKE)
