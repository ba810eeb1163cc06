"""Confidence intervals and tests of significance."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

Name = TypeVar("Name", bound=Hashable)
BOOTSTRAP_VALUES = 2**20  # resampled values in memory at a time
MIN_OFF_BOUND = 10  # values off the bounds of their range that the bootstrap of their mean needs
BOUND_TOLERANCE = 1e-6  # rounding of a float32 value at a bound of its range, as a share of the range
ROUNDING = 1e-12  # largest error of a difference of float64 values, as a share of the values


def bootstrap_interval(
    values: npt.ArrayLike, *, num: int = 2000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Return the percentile bootstrap interval (Efron 1979) of the mean of values (N,), from ``num`` resamples.

    It suits means of continuous values without bounds. Others need :func:`wilson_interval` or :func:`mean_interval`:
    resamples of zeros are all zero.

    Raises:
        ValueError: there are no values.
    """
    data = np.asarray(values, dtype=np.float64)
    if len(data) == 0:
        raise ValueError("values is empty; the interval of a mean needs one value or more")
    rng = np.random.default_rng(seed)
    batch_size = max(1, BOOTSTRAP_VALUES // max(1, len(data)))
    batches = [min(batch_size, num - i) for i in range(0, num, batch_size)]
    means = np.concatenate([data[rng.integers(0, len(data), (batch, len(data)))].mean(1) for batch in batches])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mean_interval(values: npt.ArrayLike, low: float, high: float, *, seed: int = 0) -> tuple[float, float]:
    """Return the 95% interval of the mean of values (N,) in a range, within that range.

    It is the bootstrap's. But resamples of equal values are equal, so the bootstrap of values that (almost) all lie at
    one bound of the range has (almost) no width. If some values lie at a bound and fewer than ``MIN_OFF_BOUND`` do not,
    or if all values are equal, the interval is Wilson's for their mean as a share of the range.

    Args:
        values: single values may lie outside of the range, as contributions to an area under a ROC curve do.
        low, high: the bounds of the mean, ``low < high``.

    Raises:
        ValueError: there are no values, or ``low`` is not below ``high``.
    """
    if not low < high:
        raise ValueError(f"low is {low} and high is {high}; low must be smaller")
    data = np.asarray(values, dtype=np.float64)
    first, last = bootstrap_interval(data, seed=seed)
    at_bounds = (np.isclose(data, bound, rtol=0, atol=BOUND_TOLERANCE * (high - low)) for bound in (low, high))
    if np.ptp(data) == 0 or any(at_bound.any() and (~at_bound).sum() < MIN_OFF_BOUND for at_bound in at_bounds):
        share = min(1.0, max(0.0, float((data.mean() - low) / (high - low))))
        first, last = (low + (high - low) * end for end in wilson_interval(share * len(data), len(data)))
    return max(low, first), min(high, last)


def wilson_interval(successes: float, num: int, z: float = 1.96) -> tuple[float, float]:
    """Return the confidence interval of a share (Wilson 1927), within [0, 1]; 95% with the default ``z``.

    Args:
        successes: number of successes, 0 to ``num``. A sum of probabilities is allowed: values in [0, 1] vary at most
            as much as zeros and ones of the same mean, so the interval is not too narrow.
        num: number of trials; with 0 the interval is (0, 1).

    Raises:
        ValueError: ``num`` is negative, or ``successes`` is not within 0 to ``num``.
    """
    if num < 0:
        raise ValueError(f"num is {num}; allowed is at least 0")
    if not 0 <= successes <= num:
        raise ValueError(f"successes is {successes}; allowed is 0 to {num}, the number of trials")
    if num == 0:
        return 0.0, 1.0
    rate = successes / num
    center = (rate + z * z / (2 * num)) / (1 + z * z / num)
    half_width = z / (1 + z * z / num) * math.sqrt(rate * (1 - rate) / num + z * z / (4 * num * num))
    return max(0.0, center - half_width), min(1.0, center + half_width)


def difference_interval(
    share: float, interval: Sequence[float], other: float, other_interval: Sequence[float]
) -> tuple[float, float]:
    """Return the 95% interval of ``share - other`` from the Wilson intervals of two proportions.

    It assumes independent samples, so it is wider than needed for two classifiers of the same images.

    Source: Newcombe 1998 (Statistics in Medicine 17:873), method 10.
    """
    low = share - other - math.hypot(share - interval[0], other_interval[1] - other)
    high = share - other + math.hypot(interval[1] - share, other - other_interval[0])
    return low, high


def mcnemar_test(first: npt.ArrayLike, second: npt.ArrayLike) -> float:
    """Return the exact p-value of paired outcomes (McNemar 1947): that ``first`` succeeds as often as ``second``.

    The alternative is one-sided: ``first`` succeeds more often.

    Args:
        first, second: 0 or 1 for each trial, (N,).
    """
    from scipy.stats import binomtest

    a, b = np.asarray(first) > 0.5, np.asarray(second) > 0.5
    only_first, only_second = int((a & ~b).sum()), int((b & ~a).sum())
    if only_first + only_second == 0:
        return 1.0
    return float(binomtest(only_first, only_first + only_second, alternative="greater").pvalue)


def paired_t_test(first: npt.ArrayLike, second: npt.ArrayLike) -> float:
    """Return the p-value that the mean of ``first`` is at most that of ``second``, both (N,), by pairs.

    Pairs with a value that is not finite do not count. The p-value is 1 for fewer than two pairs. If all N differences
    are equal up to rounding, the t-test is not defined, and the sign test replaces it: 1 / 2^N for a positive
    difference, else 1.
    """
    from scipy.stats import ttest_rel

    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    is_finite = np.isfinite(a) & np.isfinite(b)
    a, b = a[is_finite], b[is_finite]
    if len(a) < 2:
        return 1.0
    differences, rounding = a - b, ROUNDING * max(np.abs(a).max(), np.abs(b).max())
    if np.ptp(differences) <= rounding:
        return 0.5 ** len(a) if differences.mean() > rounding else 1.0
    return float(ttest_rel(a, b, alternative="greater").pvalue)


def holm_adjust(p_values: dict[Name, float]) -> dict[Name, float]:
    """Return the p-values of several tests, adjusted for their number (Holm 1979); at most 1."""
    adjusted: dict[Name, float] = {}
    largest = 0.0
    for i, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, (len(p_values) - i) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def chance_error(numbers: dict[str, Any] | None, num_classes: int = 1, what: str = "protected images") -> str | None:
    """Return one sentence if a classifier is at chance, else None.

    It is at chance if the 95% interval of its accuracy contains chance or lies below it.

    Args:
        numbers: ``accuracy``, ``accuracy_interval`` and ``chance`` as :func:`raypp.evaluation.evaluate.evaluate`
            returns them. Bundles of earlier versions lack ``chance``, which is then 1 / ``num_classes``.
        num_classes: number of classes, for numbers without ``chance``.
        what: the images that were classified.
    """
    if not numbers or numbers.get("accuracy_interval") is None:
        return None
    low, high = numbers["accuracy_interval"]
    chance = numbers.get("chance", 1 / max(1, num_classes))
    if low > chance:
        return None
    return (
        f"accuracy on {what} is at chance: {numbers['accuracy']:.1%} (95% interval {low:.1%} to {high:.1%}), and "
        f"always naming the most frequent class gives {chance:.1%}; train for more epochs, or lower train.alpha or "
        "train.optimizer.lr"
    )
