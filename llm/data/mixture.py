"""Several prepared corpora as one, each drawn from in proportion to its weight."""

import functools
from collections.abc import Sequence

import numpy as np

from llm.data.loader import Batch, Dataset
from llm.errors import InputError

BLOCK = 10_000  # weights are exact to one row in so many


class Mixture:
    """Packed datasets interleaved by weight; each walks its own epochs.

    Which dataset a place belongs to is a function of the place alone: a block of BLOCK places holds every dataset's
    share, evenly spread, and blocks repeat.
    """

    def __init__(self, datasets: Sequence["Dataset | Mixture"], weights: Sequence[float]):
        flat = [d for d in datasets if isinstance(d, Dataset)]
        if len(flat) != len(datasets):
            raise InputError("a mixture is made of prepared folders, not of mixtures; name their parts")
        for dataset in flat[1:]:
            if (dataset.plan is None, dataset.row_length) != (flat[0].plan is None, flat[0].row_length):
                raise InputError("data.prepared: all must be packed into rows of one length")
        if len(flat) > 1 and flat[0].plan is None:
            raise InputError("data.prepared: unpacked examples cannot be mixed; prepare them together")
        self._datasets = flat
        share = np.asarray(weights, np.float64) / np.sum(weights)
        # Whole rows of a block, by largest remainder.
        counts = np.floor(share * BLOCK).astype(np.int64)
        counts[np.argsort(counts - share * BLOCK, kind="stable")[: BLOCK - counts.sum()]] += 1
        self._counts = counts
        self._starts = np.cumsum([0, *map(len, flat)])

    @functools.cached_property
    def _sequence(self) -> tuple[np.ndarray, np.ndarray]:
        """(BLOCK,) the dataset of each place of a block, and how many of that dataset came before it there."""
        # The j-th of a dataset's c rows is due at (j + 1/2) / c of the block: sorted by that, every prefix holds
        # each dataset's share to within one row.
        due = np.concatenate([(np.arange(c) + 0.5) / c for c in self._counts])
        owner = np.repeat(np.arange(len(self._counts)), self._counts)
        before = np.concatenate([np.arange(c) for c in self._counts])
        order = np.lexsort((owner, due))
        return owner[order], before[order]

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def tokens(self) -> int:
        """Targets of all rows of all datasets."""
        return sum(dataset.tokens for dataset in self._datasets)

    @property
    def text_bytes(self) -> int:
        """Bytes of the text of all datasets."""
        return sum(dataset.text_bytes for dataset in self._datasets)

    def rows(self, indices: np.ndarray, seed: int, epochs: np.ndarray) -> Batch:
        """Rows numbered through all datasets."""
        owner = np.searchsorted(self._starts, indices, side="right") - 1
        return self._joined(owner, indices - self._starts[owner], seed, np.broadcast_to(epochs, np.shape(indices)))

    def batch(self, seed: int, step: int, batch_size: int, part: int, parts: int) -> Batch:
        """As `batch_at`."""
        if self._datasets[0].plan is None:
            return self._datasets[0].batch(seed, step, batch_size, part, parts)
        size = batch_size // parts
        places = step * batch_size + part * size + np.arange(size)
        owners, before = self._sequence
        block, within = np.divmod(places, BLOCK)
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
