"""Confidence intervals."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

BOOTSTRAP_VALUES = 2**20  # drawn at a time


def bootstrap_interval(
    values: npt.ArrayLike, *, num: int = 2000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean (Efron 1979) of values (N,), from ``num`` resamples."""
    data = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(seed)
    together = max(1, BOOTSTRAP_VALUES // max(1, len(data)))
    parts = [min(together, num - i) for i in range(0, num, together)]
    means = np.concatenate([data[drawn.integers(0, len(data), (part, len(data)))].mean(1) for part in parts])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def wilson_interval(successes: int, num: int, z: float = 1.96) -> tuple[float, float]:
    """95% confidence interval of a proportion (Wilson 1927)."""
    share = successes / num
    centre = (share + z * z / (2 * num)) / (1 + z * z / num)
    half = z / (1 + z * z / num) * math.sqrt(share * (1 - share) / num + z * z / (4 * num * num))
    return max(0.0, centre - half), min(1.0, centre + half)


def chance_error(numbers: dict[str, Any] | None, num_classes: int = 1, what: str = "protected images") -> str | None:
    """Return one sentence if a classifier does no better than chance, else None.

    It does no better if the 95% interval of its accuracy contains chance or lies below it.

    Args:
        numbers: ``accuracy``, ``accuracy_interval`` and ``chance`` as :func:`raypp.evaluation.evaluate.evaluate`
            returns them. Bundles of earlier versions lack ``chance``: it is then 1 / ``num_classes``. None gives None.
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
