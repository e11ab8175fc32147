"""Bootstrap intervals against the distributions that they draw from."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, norm

from llm.evaluation.bootstrap import interval, mean_interval


@pytest.mark.parametrize("level", [0.5, 0.95])
def test_of_a_rate_is_the_binomial_one(level):
    # Drawing n from k ones among n with replacement is n draws of a coin with p = k / n.
    values = np.arange(200) < 130
    expected = binom.ppf([(1 - level) / 2, (1 + level) / 2], 200, 0.65) / 200
    np.testing.assert_allclose(mean_interval(values, resamples=20_000, level=level), expected, atol=1.01 / 200)


def test_of_a_mean_is_the_normal_one_when_there_are_many():
    values = np.random.default_rng(1).exponential(size=7500)
    error = values.std() / np.sqrt(len(values))
    low, high = mean_interval(values, resamples=4000)
    np.testing.assert_allclose(
        [(low - values.mean()) / error, (high - values.mean()) / error], norm.ppf([0.025, 0.975]), atol=0.15
    )


def test_draws_as_many_as_there_are_with_replacement():
    seen = []

    def different(drawn_E):
        seen.append(drawn_E)
        return len(np.unique(drawn_E)) / len(drawn_E)

    low, high = interval(different, 2000, resamples=50)
    assert len(seen) == 50 and {len(drawn_E) for drawn_E in seen} == {2000}
    assert set(np.unique(seen)) == set(range(2000))
    # An example is missed with probability (1 - 1/n)^n, about 1/e.
    assert 0.6 < low < 1 - np.exp(-1) < high < 0.66


def test_any_score():
    values = np.random.default_rng(2).normal(size=401)
    low, high = interval(lambda drawn_E: np.median(values[drawn_E]), 401)
    # The order statistics around the middle bound the median (sign test): ranks n/2 -+ 1.96 sqrt(n)/2.
    expected = np.sort(values)[[180, 220]]
    np.testing.assert_allclose([low, high], expected, atol=0.06)


def test_the_seed_decides():
    values = np.random.default_rng(3).normal(size=50)
    assert mean_interval(values) == mean_interval(values) == mean_interval(values, seed=0)
    assert mean_interval(values, seed=1) != mean_interval(values)


@settings(deadline=None, max_examples=25)
@given(st.permutations([0.0, 0.1, 0.2, 0.7, 1.0, 1.0, 1e-9, 3.3]))
def test_the_order_of_the_examples_does_not_matter(values):
    assert mean_interval(values, resamples=100) == mean_interval(sorted(values, reverse=True), resamples=100)


def test_one_example_has_no_spread():
    assert mean_interval([0.25]) == (0.25, 0.25)
    assert interval(lambda drawn_E: 7.0 + drawn_E.sum(), 1) == (7.0, 7.0)


@pytest.mark.parametrize(
    "values, options, message",
    [
        ([], {}, "no examples"),
        ([1.0], {"resamples": 0}, "resamples=0"),
        ([1.0], {"level": 0.0}, "level=0.0"),
        ([1.0], {"level": 95}, "level=95"),
    ],
)
def test_refuses(values, options, message):
    with pytest.raises(ValueError, match=message):
        mean_interval(values, **options)
