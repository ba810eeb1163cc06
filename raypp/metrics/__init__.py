"""Image similarity, re-identification and confidence intervals."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raypp.metrics.arrays import reidentified

__all__ = ["reidentified"]


def __getattr__(name: str) -> Any:
    """Import the function for arrays at its first use, because it needs torch."""
    if name not in __all__:
        raise AttributeError(f"module 'raypp.metrics' has no attribute {name!r}")
    return getattr(importlib.import_module("raypp.metrics.arrays"), name)
