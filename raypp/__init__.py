"""raypp: image protections trained with their classifiers, attacked honestly, served."""

import importlib
from typing import TYPE_CHECKING, Any

from raypp.utils import runtime

runtime.apply()  # torch and Ray read these variables at import, and every module of raypp is imported after this file
__version__ = "0.1.0"
__all__ = ["AsyncClient", "Client", "__version__"]

if TYPE_CHECKING:
    from raypp.client.http import AsyncClient, Client


def __getattr__(name: str) -> Any:
    """Import the client at its first use: it needs torch, and most modules of raypp do not."""
    if name in ("AsyncClient", "Client"):
        return getattr(importlib.import_module("raypp.client.http"), name)
    raise AttributeError(f"module 'raypp' has no attribute {name!r}")
