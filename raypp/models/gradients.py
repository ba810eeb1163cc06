"""Straight-through gradients (Bengio, Leonard, Courville 2013)."""

from __future__ import annotations

from torch import Tensor


def straight_through(values: Tensor, replacement: Tensor) -> Tensor:
    """Return ``replacement``, whose gradient passes unchanged to ``values`` of the same shape."""
    return values + (replacement - values).detach()
