"""raypp: image protections trained with their classifiers, attacked honestly, served."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["AsyncClient", "Client", "__version__"]

if TYPE_CHECKING:
    from raypp.remote import AsyncClient, Client


def __getattr__(name: str) -> Any:
    """Import the client when it is asked for: it needs torch, and most of what imports raypp does not."""
    if name in {"AsyncClient", "Client"}:
        return getattr(importlib.import_module("raypp.remote"), name)
    raise AttributeError(f"module 'raypp' has no attribute {name!r}")
