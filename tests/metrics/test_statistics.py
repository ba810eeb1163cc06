"""The paired t-test and the interval of a share where their formulas are not defined."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import ttest_rel

from raypp.metrics.statistics import paired_t_test, wilson_interval

pytestmark = pytest.mark.filterwarnings("error")
VALUES = np.random.default_rng(0).normal(size=30)


def test_the_p_value_is_that_of_scipy() -> None:
    other = VALUES + np.random.default_rng(1).normal(size=30)
    assert paired_t_test(VALUES, other) == pytest.approx(ttest_rel(VALUES, other, alternative="greater").pvalue)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_pairs_that_are_not_finite_do_not_count(value: float) -> None:
    first, second = VALUES + 0.1, np.sort(VALUES)
    expected = paired_t_test(first, second)
    assert 0 < expected < 1
    assert paired_t_test([*first, value, 1], [*second, 1, value]) == expected
    assert paired_t_test([value] * 5, second[:5]) == 1
    assert paired_t_test([value, value, 1], [0, 0, 0]) == 1


@pytest.mark.parametrize("offset", [0.25, 0.1, 1e-9])
def test_constant_differences_are_judged_by_their_signs(offset: float) -> None:
    """0.25 is exact in float64, 0.1 leaves differences of rounding."""
    values = np.abs(VALUES).clip(0.01, 1)
    assert paired_t_test(values + offset, values) == 0.5**30
    assert paired_t_test(values, values + offset) == 1
    assert paired_t_test(values, values) == 1
    assert paired_t_test([1, 1], [0, 0]) == 0.25


def test_almost_constant_differences_give_no_warning() -> None:
    noise = 1e-11 * np.random.default_rng(2).normal(size=30)
    assert 0 <= paired_t_test(VALUES + 0.1 + noise, VALUES) < 1e-9


@pytest.mark.parametrize(
    ("successes", "num", "sentence"),
    [
        (-1, 10, "successes is -1; allowed is 0 to 10, the number of trials"),
        (11, 10, "successes is 11; allowed is 0 to 10, the number of trials"),
        (math.nan, 10, "successes is nan; allowed is 0 to 10, the number of trials"),
        (1, 0, "successes is 1; allowed is 0 to 0, the number of trials"),
        (0, -1, "num is -1; allowed is at least 0"),
    ],
)
def test_an_interval_of_an_impossible_share_is_refused(successes: float, num: int, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        wilson_interval(successes, num)
