"""Pictures of attention weights."""

import pathlib
from collections.abc import Sequence

import numpy as np


def heat_map(
    weights_TS: np.ndarray, queries: Sequence[str], keys: Sequence[str], path: pathlib.Path, title: str = ""
) -> None:
    """Draws the weights of one head, (T, S), each cell with its number, to a PNG; `queries` label the rows.

    Raises:
        ValueError: the labels do not fit the weights.
    """
    if np.shape(weights_TS) != (len(queries), len(keys)):
        raise ValueError(f"weights of shape {np.shape(weights_TS)} have {len(queries)} x {len(keys)} labels")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (1.6 + 0.9 * len(keys), 1.3 + 0.7 * len(queries))
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    axes.imshow(weights_TS, cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto")
    axes.set_xticks(range(len(keys)), keys)
    axes.set_yticks(range(len(queries)), queries)
    axes.xaxis.tick_top()
    for t, s in np.ndindex(np.shape(weights_TS)):
        value = float(weights_TS[t, s])
        axes.text(s, t, f"{value:.3f}", ha="center", va="center", color="white" if value > 0.6 else "black")
    if title:
        figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)
