"""Who is it: a name left out of a sentence of Jane Austen, to be found in the text before it.

Span question answering, as SQuAD's, by questions that need no annotator (llm/data/cloze.py): those to five novels are
learned, those to Persuasion, most of whose names occur in no other, are asked. A context that is too long for a row is
read in windows.

Command:   python -m llm.train --config=experiments/bert/names.py --workdir=runs/bert-names
Needs:     runs/bert-pretrain (experiments/bert/pretrain.py); the variant `scratch` does without
Hardware:  two CPU cores
Time:      not measured yet in full
Score:     not measured yet in full
"""

from experiments.bert.fine_tuning import PRETRAINED, SCRATCH, SMOKE
from experiments.bert.small import small_bert
from llm.config import Config, with_variant


def get_config(variant: str = "") -> Config:
    """The full run; `scratch`, which trains encoder and tokenizer anew; or `smoke`."""
    config = small_bert()
    config.data.train = "austen_names/train"
    config.data.validation = "austen_names/test"
    config.data.fields = ("question", "text")
    config.data.answer = "answer"
    config.data.row_length = 128
    config.data.buckets = (128,)
    config.tokenizer.kind = "wordpiece"
    config.tokenizer.lowercase = True
    config.tokenizer.vocab_size = 8192
    config.tokenizer.path = f"{PRETRAINED}/tokenizer.json"
    config.objective.kind = "span_qa"

    config.model.dropout = 0.1

    config.training.start_from = PRETRAINED
    config.training.steps = 1000
    config.training.batch_size = 32
    config.training.validate_every = 200
    config.training.validation_rows = 512
    config.training.checkpoint_every = 1000
    config.evaluation.batch_size = 64
    config.evaluation.answer_tokens = 8
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.weight_decay = 0.1
    smoke = SMOKE | {"data.row_length": 128, "data.buckets": (128,)}
    return with_variant(config, variant, smoke=smoke, scratch=SCRATCH)
