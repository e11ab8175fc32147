"""Scaling laws fitted to points of known laws."""

import numpy as np
import pytest

from llm.errors import InputError
from llm.evaluation.scaling import PowerLaw, fit

SIZES = np.geomspace(1e10, 1e13, 6)


@pytest.mark.parametrize("law", [PowerLaw(1.3, 400.0, 0.2), PowerLaw(0.0, 12.0, 0.05), PowerLaw(2.0, 3e4, 0.45)])
def test_a_law_is_found_again(law):
    found = fit(SIZES, law(SIZES), resamples=2).law
    np.testing.assert_allclose(found(1e15), law(1e15), rtol=1e-4)
    assert found.exponent == pytest.approx(law.exponent, rel=1e-2) and abs(found.floor - law.floor) < 0.02
    assert law(1e10) == law.floor + law.scale * 1e10**-law.exponent
    known = fit(SIZES, law(SIZES), resamples=2, floor=law.floor).law
    assert known.floor == law.floor and known.exponent == pytest.approx(law.exponent, rel=1e-6)


def test_intervals_hold_the_truth_as_often_as_they_should_and_widen_with_the_noise():
    law, rng, held, widths = PowerLaw(1.3, 400.0, 0.2), np.random.default_rng(0), 0, []
    for noise in [0.002] * 6 + [0.01] * 6:
        found = fit(SIZES, law(SIZES) * np.exp(noise * rng.normal(size=len(SIZES))), resamples=40)
        low, high = found.interval(lambda one: float(one(1e14)))
        held += low <= law(1e14) <= high
        widths.append(high - low)
    assert held >= 8 and np.mean(widths[6:]) > 2 * np.mean(widths[:6])


def test_points_that_no_law_can_be_fitted_to_are_refused():
    with pytest.raises(InputError, match="3 sizes: a law of three numbers needs at least 4"):
        fit([1, 2, 3, 3], [4, 3, 2, 2])
    with pytest.raises(InputError, match="above 0 only"):
        fit([1, 2, 3, 4], [4, 3, 2, float("nan")])
