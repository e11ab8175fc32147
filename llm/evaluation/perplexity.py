"""Loss, perplexity and bits per byte over a data set."""

import dataclasses
import math
from collections.abc import Callable, Iterator

import jax
import numpy as np

from llm.data import Dataset, Mixture, sequential
from llm.evaluation.bootstrap import interval
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
        perplexity_interval: 95% bootstrap interval over the rows.
        bits_per_byte: all bits over all bytes of text. Does not depend on the tokenizer.
    """

    loss: float
    perplexity: float
    perplexity_interval: tuple[float, float]
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


def row_sums(
    row_losses: Callable,
    params,
    dataset: Dataset | Mixture,
    batch_size: int,
    mesh: jax.sharding.Mesh,
    limit: int | None = None,
    progress: Callable[[int], object] = lambda rows: None,
) -> tuple[np.ndarray, np.ndarray]:
    """(nats_E, weights_E), float64: the summed loss of every row once, in order, or of `limit` rows evenly spaced.

    Rows that fill up the last batch are left out: the batch size changes the result by no more than the rounding of one
    row's float32 sum.

    Args:
        row_losses: from `compile_row_losses`.
        batch_size: rows at a time.
        progress: told the number of rows of each finished batch.
    """
    found = []
    for batch, real in batches(dataset, batch_size, mesh, limit):
        sums = hosts.fetch(row_losses(params, put_batch(mesh, batch)))
        found.append(np.stack([np.asarray(x, np.float64)[:real] for x in sums]))
        progress(real)
    nats_E, weights_E = np.concatenate(found, axis=1)
    return nats_E, weights_E


def mean_loss(nats_E: np.ndarray, weights_E: np.ndarray) -> float:
    """Nats a token over rows; 0 where nothing counts."""
    return float(nats_E.sum() / max(weights_E.sum(), 1.0))


def perplexity(nats_E: np.ndarray, weights_E: np.ndarray, text_bytes: int) -> Perplexity:
    """The scores of all rows, whose sums `row_sums` has, that encode so many bytes of text."""

    def of(loss: float) -> float:
        return math.exp(min(loss, 700.0))

    loss = mean_loss(nats_E, weights_E)
    low, high = interval(lambda drawn_E: mean_loss(nats_E[drawn_E], weights_E[drawn_E]), len(nats_E))
    return Perplexity(
        loss=loss,
        perplexity=of(loss),
        perplexity_interval=(of(low), of(high)),
        bits_per_byte=float(nats_E.sum()) / math.log(2) / text_bytes,
        tokens=round(weights_E.sum()),
        bytes=text_bytes,
    )


def records(nats_E: np.ndarray, weights_E: np.ndarray) -> list[dict[str, float]]:
    """Of each row its number, how many of its tokens count, and their mean loss in nats, 0 where none does."""
    means_E = nats_E / np.maximum(weights_E, 1.0)
    return [
        {"example": number, "loss": round(loss, 6), "tokens": round(tokens)}
        for number, (loss, tokens) in enumerate(zip(means_E.tolist(), weights_E.tolist()))
    ]
