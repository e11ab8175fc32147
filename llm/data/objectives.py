"""What is learned from packed rows: the batch dict that models and losses see.

The keys, all of shape (batch, row length):

    tokens      int32    inputs
    targets     int32    the id to predict at each place
    weights     float32  how much each place counts in the loss; 0 at padding
    segments    int32    1, 2, ... for the documents of a row, 0 for padding
    positions   int32    0, 1, ... within each document's part of the row
"""

import numpy as np

KEYS = ("tokens", "targets", "weights", "segments", "positions")


def causal(tokens_BT: np.ndarray, targets_BT: np.ndarray, segments_BT: np.ndarray) -> dict[str, np.ndarray]:
    """Next-token prediction within each document of the packed rows."""
    index = np.broadcast_to(np.arange(tokens_BT.shape[1], dtype=np.int32), tokens_BT.shape)
    starts = np.ones(segments_BT.shape, bool)
    starts[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    first = np.maximum.accumulate(np.where(starts, index, 0), axis=1)
    return {
        "tokens": tokens_BT.astype(np.int32),
        "targets": targets_BT.astype(np.int32),
        "weights": (segments_BT != 0).astype(np.float32),
        "segments": segments_BT.astype(np.int32),
        "positions": (index - first).astype(np.int32),
    }
