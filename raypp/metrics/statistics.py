"""Confidence intervals."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

BOOTSTRAP_VALUES = 2**20  # resampled values in memory at a time


def bootstrap_interval(
    values: npt.ArrayLike, *, num: int = 2000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Return the percentile bootstrap interval (Efron 1979) of the mean of values (N,), from ``num`` resamples."""
    data = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    batch_size = max(1, BOOTSTRAP_VALUES // max(1, len(data)))
    batches = [min(batch_size, num - i) for i in range(0, num, batch_size)]
    means = np.concatenate([data[rng.integers(0, len(data), (batch, len(data)))].mean(1) for batch in batches])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def wilson_interval(successes: int, num: int, z: float = 1.96) -> tuple[float, float]:
    """Return the confidence interval of a proportion (Wilson 1927); 95% with the default ``z``."""
    rate = successes / num
    center = (rate + z * z / (2 * num)) / (1 + z * z / num)
    half_width = z / (1 + z * z / num) * math.sqrt(rate * (1 - rate) / num + z * z / (4 * num * num))
    return max(0.0, center - half_width), min(1.0, center + half_width)


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
