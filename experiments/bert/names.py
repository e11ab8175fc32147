"""Who is it: a name left out of a sentence of Jane Austen, to be found in the text before it.

Span question answering, as SQuAD's, by questions that need no annotator (llm/data/cloze.py): those to five novels are
learned, those to Persuasion are asked. All names are dealt out anew for each question: reading alone tells.

Command:   python -m llm.train --config=experiments/bert/names.py --workdir=runs/bert-names
Needs:     nothing; the variant `pretrained` starts from runs/bert-pretrain (experiments/bert/pretrain.py)
Hardware:  two CPU cores
Time:      5 min 16 s on one slow core, 4 min 39 s of it training; 1,470,722 parameters
Score:     31.8 % exact match by one seed (27.7 to 35.8), of 494 questions: no better than guessing among the names of
           the text, 33.9 %. The last name that the question does not hold itself is right at 38.3 %, the most frequent
           one at 36.0 (`python -m benchmarks.peers --all`)

So much is learned from 3,169 questions: what a name is, not yet who is meant. Longer runs learn the questions by heart:
of --config.training.steps=1000 --config.model.dropout=0.1, 800 steps had 0.007 nats on them and 5.7 on the others.
`pretrained` was not measured.
"""

from typing import Any

from experiments.bert.fine_tuning import PRETRAINED, SMOKE
from experiments.bert.small import small_bert
from llm.config import Config, with_variant

# The pre-trained encoder reads 128 tokens: two windows for most questions, of which one holds no answer.
FINE_TUNING: dict[str, Any] = {
    "data.row_length": 128,
    "data.buckets": (128,),
    "model.context": 128,
    "tokenizer.lowercase": True,
    "tokenizer.path": f"{PRETRAINED}/tokenizer.json",
    "training.start_from": PRETRAINED,
}


def get_config(variant: str = "") -> Config:
    """The full run; `pretrained`, the encoder of experiments/bert/pretrain.py fine-tuned; or `smoke`."""
    config = small_bert(300)
    config.data.train = "austen_names/train"
    config.data.validation = "austen_names/test"
    config.data.fields = ("question", "text")
    config.data.answer = "answer"
    config.data.row_length = 192
    config.data.buckets = (128, 192)
    config.tokenizer.kind = "wordpiece"
    config.tokenizer.lowercase = False  # names are N10 to N59
    config.tokenizer.vocab_size = 8192
    config.objective.kind = "span_qa"

    config.model.context = 192
    config.model.dropout = 0.3

    config.training.batch_size = 32
    config.evaluation.batch_size = 64
    config.evaluation.answer_tokens = 8
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.weight_decay = 0.1
    return with_variant(config, variant, smoke=SMOKE | {"model.context": 64}, pretrained=FINE_TUNING)
