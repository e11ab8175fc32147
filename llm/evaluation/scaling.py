"""Scaling laws: a loss as a power of compute, parameters or data above a floor, and how sure its numbers are."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import scipy.optimize

from llm.errors import InputError

Points = Sequence[float] | np.ndarray
_LEAST = 4  # points: one more than the law has numbers
_SPREAD = (2.5, 97.5)  # percentiles of an interval


class PowerLaw(NamedTuple):
    """loss = floor + scale * x^-exponent, E + A C^-alpha of Hoffmann et al. 2022."""

    floor: float
    scale: float
    exponent: float

    def __call__(self, x):
        """The loss at x, a number or an array."""
        return self.floor + self.scale * np.asarray(x, np.float64) ** -self.exponent


class Fit(NamedTuple):
    """The law of some points, and the laws of points that might have been measured in their place."""

    law: PowerLaw
    others: tuple[PowerLaw, ...]

    def interval(self, of: Callable[[PowerLaw], float]) -> tuple[float, float]:
        """The middle 95% of a number of the law, such as `lambda law: law(1e15)`, over `others`."""
        low, high = np.percentile([of(law) for law in self.others], _SPREAD)
        return float(low), float(high)


def fit(xs: Points, losses: Points, resamples: int = 100, floor: float | None = None) -> Fit:
    """The law whose logarithm is nearest to the losses' by least squares.

    The others come of a residual bootstrap: to the law's losses its own residuals are added in random order with
    repetition, widened by sqrt(n / (n - numbers)) as the law was bent to them, and a law is fitted anew. It shows how
    far the numbers hang together with the noise of single runs, not whether a power law is right.

    Args:
        xs: compute, parameters or tokens of each run, above 0.
        losses: of each run, above 0.
        resamples: how many others.
        floor: of the law where it is known; None fits it too, from 0 up.

    Raises:
        InputError: fewer points than the law has numbers and one, or points that are not above 0.
    """
    x, y = np.asarray(xs, np.float64), np.asarray(losses, np.float64)
    if len(set(xs)) < _LEAST:
        raise InputError(f"{len(set(xs))} sizes: a law of three numbers needs at least {_LEAST} to be fitted to")
    if not (np.isfinite(x) & np.isfinite(y) & (x > 0) & (y > 0)).all():
        raise InputError("a law is fitted to sizes and losses above 0 only")
    law = _nearest(x, y, floor)
    numbers = 3 if floor is None else 2
    residuals = (np.log(y) - np.log(law(x))) * np.sqrt(len(x) / (len(x) - numbers))
    rng = np.random.default_rng(0)
    others = tuple(
        _nearest(x, law(x) * np.exp(rng.choice(residuals, len(x))), floor, start=law) for _ in range(resamples)
    )
    return Fit(law, others)


def _nearest(x: np.ndarray, y: np.ndarray, floor: float | None, start: PowerLaw | None = None) -> PowerLaw:
    """The law nearest to log y; from several starts where none is given, as the floor has local minima."""
    middle = np.exp(np.log(x).mean())  # about it scale and exponent are nearly independent
    top = y.min() * (1 - 1e-9)

    def law_of(numbers) -> PowerLaw:
        low, log_scale, exponent = numbers if floor is None else (floor, *numbers)
        return PowerLaw(float(low), float(np.exp(log_scale) * middle**exponent), float(exponent))

    def residuals(numbers) -> np.ndarray:
        low, log_scale, exponent = numbers if floor is None else (floor, *numbers)
        return np.log(low + np.exp(log_scale - exponent * np.log(x / middle))) - np.log(y)

    lows = [share * top for share in (0.0, 0.3, 0.6, 0.8, 0.95)] if floor is None else [floor]
    begin = [(low, np.log(max(y.mean() - low, 1e-6 * y.mean())), 0.3) for low in lows]
    if start is not None:
        begin = [(min(start.floor, top), np.log(start.scale * middle**-start.exponent), start.exponent)]
    bounds = ([0.0, -np.inf, 0.0], [top, np.inf, np.inf])
    skip = 0 if floor is None else 1
    found = [
        scipy.optimize.least_squares(
            residuals, numbers[skip:], bounds=(bounds[0][skip:], bounds[1][skip:]), x_scale="jac", xtol=1e-12
        )
        for numbers in begin
    ]
    return law_of(min(found, key=lambda one: one.cost).x)
