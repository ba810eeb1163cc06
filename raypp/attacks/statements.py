"""Statements that a protection makes about itself by attributes; attacks use them."""

from __future__ import annotations

import inspect
import math
from typing import Any

from raypp.attacks.base import ImageMap
from raypp.utils.errors import ConfigError


def stated_noise_std(protection: Any, name: str) -> float | None:
    """Return the attribute ``noise_std`` of a protection, or None if it has none.

    A protection states with it that it adds independent Gaussian noise of this standard deviation, in gray levels, to
    each value before it clips to [0, 255] and rounds.

    Raises:
        ConfigError: it is not a positive number.
    """
    value = getattr(protection, "noise_std", None)
    if value is None:
        return None
    try:
        std = float(value)
    except (TypeError, ValueError):
        std = math.nan
    if not (math.isfinite(std) and std > 0):
        raise ConfigError(f"{name}.noise_std is {value!r}; allowed is a positive number of gray levels")
    return std


def logits_of(protection: Any) -> ImageMap | None:
    """Return the method ``logits`` of a differentiable protection, its output before the last sigmoid, or None.

    A user's method of this name may be something else, so attacks check it with
    :func:`raypp.attacks.misfit.checked_logits`.
    """
    method = getattr(protection, "logits", None)
    return method if inspect.ismethod(method) else None
