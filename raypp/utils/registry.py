"""One registry per kind of method, and the options that every method declares beside its code.

A registry maps the name a user writes to ``"module:Class"``. The module is imported when the name is first used, so a
listing or a help text never pays for torch. The class names its options model in ``Options``; the configuration
validates against it, so that adding a method is one file and one line in its registry.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterator
from typing import Any, ClassVar, Protocol

from pydantic import BaseModel, ConfigDict

from raypp.utils.errors import ConfigError


class MethodConfig(BaseModel):
    """Frozen options of one method; ``name`` selects the method, unknown keys are refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, ser_json_inf_nan="constants"
    )

    name: str


class Method(Protocol):
    """What a registry entry offers: the class of its options, and a constructor that takes them first."""

    Options: ClassVar[type[MethodConfig]]


class Registry:
    """Methods of one kind by name.

    Args:
        kind: what the entries are, as it should read in a message ("protection", "data source").
        entries: name to ``"module:Class"``.
    """

    def __init__(self, kind: str, entries: dict[str, str]) -> None:
        self.kind = kind
        self._entries = dict(entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def get(self, name: str) -> Any:
        """Return the class registered under ``name``; raises ConfigError that lists what is allowed."""
        if name not in self._entries:
            raise ConfigError(f"unknown {self.kind} {name!r}{suggest(name, self._entries)}; allowed: {', '.join(self)}")
        module, _, attribute = self._entries[name].partition(":")
        return getattr(importlib.import_module(module), attribute)

    def options(self, name: str) -> type[MethodConfig]:
        """Return the options model of ``name``."""
        model: type[MethodConfig] = self.get(name).Options
        return model

    def build(self, options: MethodConfig, /, *args: Any, **kwargs: Any) -> Any:
        """Construct the method that ``options.name`` selects."""
        return self.get(options.name)(options, *args, **kwargs)


def suggest(word: str, known: Any) -> str:
    """Return ``", did you mean 'x'?"`` for the closest known word, or an empty string."""
    close = difflib.get_close_matches(word, [str(k) for k in known], n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""
