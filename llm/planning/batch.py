"""The shapes of an experiment's batch, without its data or its tokenizer."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from llm.config import Experiment
from llm.data import masking, objectives, packed
from llm.data.specials import Specials
from llm.sharding import partition_spec


def abstract_batch(experiment: Experiment, vocab_size: int, mesh: jax.sharding.Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and places of a whole batch of rows that are full, by the keys of `llm.data.objectives`."""
    place = jax.sharding.NamedSharding(mesh, partition_spec(("batch",)))
    rows = experiment.training.batch_size
    return {
        key: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype, sharding=place)
        for key, x in made_up_row(experiment, vocab_size).items()
    }


def tokens_of(batch: Mapping[str, Any]) -> int:
    """Tokens that full rows of arrays or shapes read, sources included: what the train step counts."""
    return sum(batch[key].size for key in ("segments", "source_segments") if key in batch)


def made_up_row(experiment: Experiment, vocab_size: int) -> dict[str, np.ndarray]:
    """A made-up row, as long as rows get, by the objective's own function: it cannot differ from what is trained on."""
    data, spec = experiment.data, experiment.objective
    length, rngs = data.row_length, [np.random.default_rng(0)]
    _, spans = masking.span_counts(length, spec.mask_rate, spec.mean_span)
    specials = Specials(
        vocab_size,
        end_of_text=0,
        cls=1,
        sep=2,
        mask=3,
        sentinels=tuple(range(vocab_size - spans, vocab_size)),
        starts_word=np.ones(vocab_size, bool),
    )
    token = np.full((1, length), 4, np.int32)
    if data.packing == "whole":
        example, more = [token[0]] * len(data.example_fields), {}
        if spec.kind == "preference":  # a prompt of one token with two answers that fill the row
            example = [token[0][:1], token[0][: length // 2], token[0][: length - length // 2]]
        if spec.kind == "masked" and spec.next_sentence:
            more = {"others": [example]}
        labels = np.zeros((1, 3), np.int32)
        batch = objectives.UNPACKED[spec.kind]([example], labels, length, spec, specials, rngs, **more)
        return batch | ({"reference": np.zeros((1, 2), np.float32)} if spec.kind == "preference" else {})
    one = np.ones_like(token)
    if spec.kind == "chat":  # has the keys of the rows of texts
        return objectives.causal(token, token, one)
    if spec.kind == "continuation":
        return packed.continuation(objectives.causal(token, token, one), token, one)
    batch = objectives.PACKED[spec.kind](token, token, one, spec, specials, rngs)
    return batch | ({"continues": np.ones(1, np.int32)} if spec.stream else {})
