"""Batches from prepared rows. `batch = f(seed, step)`: the loader holds no state that a checkpoint would need."""

import concurrent.futures
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from llm.data.objectives import causal

ARRAYS = ("tokens", "targets", "segments")


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Packed rows in memory-mapped files, and the bytes of text that they encode."""

    tokens: np.ndarray
    targets: np.ndarray
    segments: np.ndarray
    text_bytes: int

    @classmethod
    def open(cls, folder: pathlib.Path, split: str, text_bytes: int) -> "Dataset":
        """The rows of one split, "train" or "validation"."""
        arrays = {name: np.load(folder / f"{split}.{name}.npy", mmap_mode="r") for name in ARRAYS}
        return cls(**arrays, text_bytes=text_bytes)

    def __len__(self) -> int:
        return len(self.tokens)

    def rows(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The batch of these rows, by the causal objective."""
        return causal(self.tokens[indices], self.targets[indices], self.segments[indices])


@functools.lru_cache(maxsize=2)
def _order(rows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(rows)


def batch_at(
    dataset: Dataset, seed: int, step: int, batch_size: int, part: int = 0, parts: int = 1
) -> dict[str, np.ndarray]:
    """The batch of one step: rows in a fresh order every epoch, none dropped where epochs meet.

    `part` of `parts` takes one host's slice, so that any number of hosts sees the same global batch.
    """
    size = batch_size // parts
    places = step * batch_size + part * size + np.arange(size)
    epochs, within = np.divmod(places, len(dataset))
    return dataset.rows(np.array([_order(len(dataset), seed, int(e))[w] for e, w in zip(epochs, within)]))


def sequential(dataset: Dataset, batch_size: int, limit: int | None = None) -> Iterator[dict[str, np.ndarray]]:
    """All rows once, in order, or `limit` of them evenly spaced; the last batch is filled up with rows of weight 0."""
    count = len(dataset) if limit is None else min(limit, len(dataset))
    rows = np.linspace(0, len(dataset) - 1, count).round().astype(np.int64)
    for start in range(0, count, batch_size):
        taken = rows[start : start + batch_size]
        batch = dataset.rows(taken)
        short = batch_size - len(taken)
        yield {key: np.pad(value, ((0, short), (0, 0))) for key, value in batch.items()}


def prefetch(make: Callable[[int], dict], steps: Iterable[int]) -> Iterator[dict]:
    """make(step) for each step, the next one under way in a thread while the caller works on this one."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = None
        for step in steps:
            following = pool.submit(make, step)
            if waiting is not None:
                yield waiting.result()
            waiting = following
        if waiting is not None:
            yield waiting.result()
