"""Loss, perplexity and bits per byte over a data set."""

import dataclasses
import math
from collections.abc import Callable, Iterator

import jax
import numpy as np

from llm.data import Dataset, Mixture, sequential
from llm.models import Model
from llm.sharding import batch_shards, hosts
from llm.training import losses
from llm.training.step import put_batch


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """The result over `tokens` predicted tokens (or examples) that encode `bytes` bytes of text.

    Attributes:
        loss: mean cross-entropy in nats a token.
        perplexity: exp(loss). Depends on the tokenizer.
        bits_per_byte: all bits over all bytes of text. Does not depend on the tokenizer.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int


def compile_row_losses(model: Model, loss_chunk: int | None, objective: str = "causal") -> Callable:
    """f(params, batch) -> (nats_B, weights_B), jitted: the loss of each row without dropout."""
    return jax.jit(losses.row_losses(model, objective, loss_chunk))


def batches(
    dataset: Dataset | Mixture, batch_size: int, mesh: jax.sharding.Mesh, limit: int | None = None
) -> Iterator[tuple[dict, int]]:
    """(a host batch, how many of its rows are real) for every row once, or `limit` rows evenly spaced.

    The size of a batch is rounded up to what the mesh can share; rows of zeros fill up the last one.
    """
    batch_size += -batch_size % batch_shards(mesh)
    left = len(dataset) if limit is None else min(limit, len(dataset))
    for batch in sequential(dataset, batch_size, limit):
        yield batch, min(batch_size, left)
        left -= batch_size


def perplexity(
    row_losses: Callable,
    params,
    dataset: Dataset | Mixture,
    batch_size: int,
    mesh: jax.sharding.Mesh,
    limit: int | None = None,
    progress: Callable[[int], object] = lambda rows: None,
) -> Perplexity:
    """Scores every row once, or `limit` rows evenly spaced.

    Rows are summed in float64 on the host, and rows that fill up the last batch weigh nothing: the batch size changes
    the result by no more than the rounding of one row's float32 sum.

    Args:
        row_losses: from `compile_row_losses`.
        batch_size: rows at a time.
        progress: told the number of rows of each finished batch.
    """
    nats, tokens = 0.0, 0.0
    for batch, real in batches(dataset, batch_size, mesh, limit):
        row_nats, row_weights = hosts.fetch(row_losses(params, put_batch(mesh, batch)))
        nats += float(np.sum(row_nats, dtype=np.float64))
        tokens += float(np.sum(row_weights, dtype=np.float64))
        progress(real)
    loss = nats / max(tokens, 1.0)
    # A part of the rows stands for its share of the text; all rows stand for all of it.
    share = 1.0 if limit is None else tokens / float(dataset.tokens)
    text_bytes = dataset.text_bytes * share
    return Perplexity(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        bits_per_byte=nats / math.log(2) / text_bytes,
        tokens=round(tokens),
        bytes=round(text_bytes),
    )
