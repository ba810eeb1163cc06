"""raypp: image protections trained with their classifiers, attacked honestly, served."""

import importlib
from typing import TYPE_CHECKING, Any

from raypp.utils import runtime

runtime.apply()  # torch and Ray read these variables at import, and every module of raypp is imported after this file
__version__ = "0.1.0"
__all__ = [
    "AsyncClient",
    "Attack",
    "Bundle",
    "Client",
    "Evaluation",
    "Protection",
    "RunResult",
    "Scorecard",
    "SearchResult",
    "Table1",
    "__version__",
    "attack",
    "evaluate",
    "list_attacks",
    "list_presets",
    "list_protections",
    "load",
    "protect",
    "register_attack",
    "register_protection",
    "table1",
    "train",
    "tune",
]

if TYPE_CHECKING:
    from raypp.api import attack, evaluate, load, protect, table1, train, tune
    from raypp.attacks import register_attack
    from raypp.attacks.base import Attack
    from raypp.catalog import list_attacks, list_presets, list_protections
    from raypp.client.http import AsyncClient, Client
    from raypp.loaded_bundle import Bundle
    from raypp.protections import register_protection
    from raypp.protections.base import Protection
    from raypp.result import Evaluation
    from raypp.results import RunResult, Scorecard, SearchResult, Table1

_MODULES = {
    "AsyncClient": "raypp.client.http",
    "Attack": "raypp.attacks.base",
    "Client": "raypp.client.http",
    **dict.fromkeys(("list_attacks", "list_presets", "list_protections"), "raypp.catalog"),
    "Bundle": "raypp.loaded_bundle",
    "Evaluation": "raypp.result",
    "Protection": "raypp.protections.base",
    "register_attack": "raypp.attacks",
    "register_protection": "raypp.protections",
    **dict.fromkeys(("RunResult", "Scorecard", "SearchResult", "Table1"), "raypp.results"),
}
_PACKAGES = ("attacks", "metrics")
"""Packages with public names, such as ``raypp.attacks.Inverse`` and ``raypp.metrics.reidentified``."""


def __getattr__(name: str) -> Any:
    """Import a public name at its first use: most of them need torch, and most modules of raypp do not."""
    if name in _PACKAGES:
        return importlib.import_module(f"raypp.{name}")
    if name not in __all__:
        raise AttributeError(f"module 'raypp' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES.get(name, "raypp.api")), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PACKAGES})
