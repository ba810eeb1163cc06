"""Registries of methods by name, and the base of their options.

A registry maps a name to ``"module:Class"`` and imports the module at first use. Lists and help texts therefore do not
import torch. The class holds its options model in ``Options``, against which the configuration is validated.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict

from raypp.utils.errors import ConfigError


class MethodConfig(BaseModel):
    """Frozen options of one method; ``name`` selects the method, and unknown keys are errors."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, ser_json_inf_nan="constants"
    )

    name: str


class Registry:
    """Methods of one kind by name.

    Args:
        kind: what the entries are, for messages ("protection", "data source").
        entries: ``"module:Class"`` by name.
    """

    def __init__(self, kind: str, entries: dict[str, str]) -> None:
        self.kind = kind
        self._entries = entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def get(self, name: str) -> Any:
        """Return the class registered under ``name``; raises ConfigError that lists the allowed names."""
        if name not in self._entries:
            raise ConfigError(f"unknown {self.kind} {name!r}{suggest(name, self)}; allowed: {', '.join(self)}")
        module, _, attribute = self._entries[name].partition(":")
        return getattr(importlib.import_module(module), attribute)

    def options(self, name: str) -> type[MethodConfig]:
        model: type[MethodConfig] = self.get(name).Options
        return model

    def build(self, options: MethodConfig, /, *args: Any, **kwargs: Any) -> Any:
        """Construct the method that ``options.name`` selects."""
        return self.get(options.name)(options, *args, **kwargs)


def suggest(word: str, known: Iterable[object]) -> str:
    """Return ``" (did you mean 'x'?)"`` with the closest known word, or an empty string."""
    close = difflib.get_close_matches(word, map(str, known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
