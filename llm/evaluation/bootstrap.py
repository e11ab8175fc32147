"""Confidence intervals of scores: how much a score would move on another test set of the same size and kind."""

from collections.abc import Callable

import numpy as np


def interval(
    score: Callable[[np.ndarray], float], examples: int, *, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """The percentile bootstrap interval (low, high) of a score (Efron & Tibshirani 1993, chapter 13).

    Each resample draws as many examples as there are, with replacement. The seed decides all draws. One example gives
    (s, s): every resample is that example, and nothing is known about its spread. The score itself need not lie in the
    middle, nor inside where it is a biased one (BLEU, F1).

    Args:
        score: f(indices_E) -> the score of these examples, an index once for each time it was drawn.
        examples: how many there are, E.
        level: the share of the resampled scores that lies within.

    Raises:
        ValueError: there is no example or no resample, or the level is not between 0 and 1.
    """
    if examples < 1:
        raise ValueError("no examples: there is nothing to draw from")
    if resamples < 1:
        raise ValueError(f"resamples={resamples}: must be at least 1")
    if not 0.0 < level < 1.0:
        raise ValueError(f"level={level}: must lie between 0 and 1, as 0.95 does")
    draw = np.random.default_rng(seed)
    # One resample at a time: all at once would take resamples x examples of memory and is no faster.
    scores = [score(draw.integers(examples, size=examples)) for _ in range(resamples)]
    low, high = np.quantile(scores, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return float(low), float(high)


def mean_interval(values_E, *, resamples: int = 1000, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """`interval` of the mean of one value an example; the order of the examples does not matter."""
    sorted_E = np.sort(np.asarray(values_E, np.float64))
    return interval(
        lambda drawn_E: sorted_E[drawn_E].mean(), len(sorted_E), resamples=resamples, level=level, seed=seed
    )
