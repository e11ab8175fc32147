"""Several prepared corpora as one, each drawn from in proportion to its weight."""

import fractions
import functools
import math
from collections.abc import Sequence

import numpy as np

from llm.data.loader import Batch, Dataset
from llm.errors import InputError

BLOCK = 10_000  # weights are exact to one row in so many, or fully where a shorter block holds them


class Mixture:
    """Packed datasets interleaved by weight; each walks its own epochs.

    Which dataset a place belongs to is a function of the place alone: blocks of places repeat, and within a block every
    prefix holds each dataset's share to less than one row (`interleaved`). Each dataset is in every block.
    """

    def __init__(self, datasets: Sequence["Dataset | Mixture"], weights: Sequence[float]):
        flat = [d for d in datasets if isinstance(d, Dataset)]
        if len(flat) != len(datasets):
            raise InputError("a mixture is made of prepared folders, not of mixtures; name their parts")
        for dataset in flat[1:]:
            if (dataset.plan is None, dataset.row_length) != (flat[0].plan is None, flat[0].row_length):
                raise InputError("data.prepared: all must be packed into rows of one length")
        if flat[0].objective.stream:
            raise InputError("objective.stream follows one text, data.prepared is a mixture; name its data alone")
        if len(flat) > 1 and flat[0].plan is None:
            raise InputError("data.prepared: unpacked examples cannot be mixed; prepare them together")
        self._datasets = flat
        self._counts = block_counts(weights)
        self._block = int(self._counts.sum())
        self._starts = np.cumsum([0, *map(len, flat)])

    @functools.cached_property
    def _sequence(self) -> tuple[np.ndarray, np.ndarray]:
        """The dataset of each place of a block, and how many of that dataset came before it there."""
        owner = interleaved(self._counts)
        before = np.empty(self._block, np.int64)
        for k, count in enumerate(self._counts):
            before[owner == k] = np.arange(count)
        return owner, before

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def datasets(self) -> list[Dataset]:
        """What is mixed."""
        return self._datasets

    @property
    def row_length(self) -> int:
        """Tokens of a row, or of the longest example."""
        return self._datasets[0].row_length

    @property
    def buckets(self) -> tuple[int, ...]:
        """Lengths that batches are padded to."""
        return self._datasets[0].buckets

    @property
    def tokens(self) -> int:
        """Targets of all rows of all datasets."""
        return sum(dataset.tokens for dataset in self._datasets)

    @property
    def text_bytes(self) -> int:
        """Bytes of the text of all datasets."""
        return sum(dataset.text_bytes for dataset in self._datasets)

    def with_reference(self, reference: np.ndarray) -> "Mixture":
        """As `Dataset.with_reference`; examples that are not packed are those of one dataset."""
        (dataset,) = self._datasets
        return Mixture([dataset.with_reference(reference)], [1])

    def rows(self, indices: np.ndarray, seed: int, epochs: np.ndarray) -> Batch:
        """Rows numbered through all datasets."""
        owner = np.searchsorted(self._starts, indices, side="right") - 1
        return self._joined(owner, indices - self._starts[owner], seed, np.broadcast_to(epochs, np.shape(indices)))

    def batch(self, seed: int, step: int, batch_size: int, mine: np.ndarray) -> Batch:
        """As `batch_at`."""
        if self._datasets[0].plan is None:
            return self._datasets[0].batch(seed, step, batch_size, mine)
        size, places = len(mine), step * batch_size + mine
        owners, before = self._sequence
        block, within = np.divmod(places, self._block)
        owner = owners[within]
        ordinal = block * self._counts[owner] + before[within]
        indices, epochs = np.empty(size, np.int64), np.empty(size, np.int64)
        for k, dataset in enumerate(self._datasets):
            here = owner == k
            indices[here], epochs[here] = dataset.walk(ordinal[here], seed)
        return self._joined(owner, indices, seed, epochs)

    def _joined(self, owner: np.ndarray, indices: np.ndarray, seed: int, epochs: np.ndarray) -> Batch:
        batch: Batch = {}
        for k in np.unique(owner):
            here = owner == k
            for key, value in self._datasets[k].rows(indices[here], seed, epochs[here]).items():
                if key not in batch:
                    batch[key] = np.zeros((len(owner), *value.shape[1:]), value.dtype)
                batch[key][here] = value
        return batch


def block_counts(weights: Sequence[float]) -> np.ndarray:
    """How many rows of each dataset a block holds, int64: the exact proportions where BLOCK or fewer rows have them.

    Others are rounded to BLOCK rows, by largest remainder, with at least one row of each.
    """
    exact = [fractions.Fraction(str(weight)) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * scale) for weight in exact]
    divisor = math.gcd(*whole)
    if sum(whole) // divisor <= BLOCK:
        return np.array([count // divisor for count in whole], np.int64)
    share = np.array([float(weight / sum(exact)) for weight in exact]) * (BLOCK - len(exact))
    counts = np.floor(share).astype(np.int64)
    counts[np.argsort(counts - share, kind="stable")[: BLOCK - len(exact) - counts.sum()]] += 1
    return counts + 1


def interleaved(counts: np.ndarray) -> np.ndarray:
    """The dataset of each place, int64 (sum of counts,): every prefix has each dataset's share of it, to less than 1.

    Tijdeman's solution of the chairman assignment problem (1980), with the bound 1 - 1 / (2k - 2) for k datasets. The
    next row of a dataset may come once it lacks 1 / (2k - 2), and must before it lacks the bound; of those that may,
    the one that must soonest is taken.
    """
    total, fine = int(counts.sum()), max(2 * len(counts) - 2, 1)
    left = [int(count) for count in counts]
    taken = [0] * len(left)

    def window(k: int) -> tuple[int, int]:
        """(the first, the last) length of a prefix that the next row of k may end."""
        first = -(-((taken[k] * fine + 1) * total) // (fine * left[k]))
        return first, ((taken[k] + 1) * fine - 1) * total // (fine * left[k])

    windows = [window(k) for k in range(len(left))]
    owner = np.zeros(total, np.int64)
    if len(left) == 1:
        return owner
    for place in range(1, total + 1):
        _, k = min((last, k) for k, (first, last) in enumerate(windows) if first <= place)
        owner[place - 1] = k
        taken[k] += 1
        windows[k] = window(k)
    return owner
