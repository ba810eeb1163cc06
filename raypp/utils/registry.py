"""Registries of methods by name, and the base of their options.

A registry maps a name to ``"module:Class"`` and imports the module at first use. Lists and help texts therefore do not
import torch. The class holds its options model in ``Options``, against which the configuration is validated.

Methods from outside are registered by a decorator, and those of installed packages by an entry point.
"""

from __future__ import annotations

import difflib
import importlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal, TypeVar, cast

from pydantic import BaseModel, ConfigDict, create_model

from raypp.utils.errors import ConfigError

Method = TypeVar("Method", bound=type)


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
        group: group of the entry points of installed packages that add methods; None for no such packages.
    """

    def __init__(self, kind: str, entries: dict[str, str], group: str | None = None) -> None:
        self.kind, self.group = kind, group
        self._entries = entries
        self._classes: dict[str, type] = {}

    def __iter__(self) -> Iterator[str]:
        return iter({**self._entries, **self._entry_points, **self._classes})

    def get(self, name: str) -> Any:
        """Return the class registered under ``name``; raises ConfigError that lists the allowed names."""
        if name in self._classes:
            return self._classes[name]
        if name in self._entries:
            module, _, attribute = self._entries[name].partition(":")
            return getattr(importlib.import_module(module), attribute)
        if name in self._entry_points:
            return self._load(self._entry_points[name])
        raise ConfigError(f"unknown {self.kind} {name!r}{suggest(name, self)}; allowed: {', '.join(self)}")

    def register(self, name: str) -> Callable[[Method], Method]:
        """Decorate a class that becomes the method ``name`` in this process.

        A class without a model ``Options`` has no options. A second class of the same name replaces the first, so that
        the cell of a notebook can run twice.

        Raises:
            ConfigError: raypp itself has a method of this name, or ``Options`` has another ``name``.
        """
        if name in self._entries:
            raise ConfigError(f"{self.kind} {name!r} is part of raypp; register yours under another name")

        def add(method: Method) -> Method:
            self._classes[name] = self._with_options(name, method)
            return method

        return add

    def class_names(self) -> dict[str, str]:
        """Names of the methods by the name of their class; imports nothing."""
        paths = self._entries | {name: entry.value for name, entry in self._entry_points.items()}
        classes = {path.rpartition(":")[2]: name for name, path in paths.items()}
        return classes | {method.__name__: name for name, method in self._classes.items()}

    @cached_property
    def _entry_points(self) -> dict[str, EntryPoint]:
        """Entry points of installed packages by name, except those whose name raypp itself has."""
        entries = {entry.name: entry for entry in entry_points(group=self.group)} if self.group is not None else {}
        for name in entries.keys() & self._entries.keys():
            warnings.warn(f"{_package(entries.pop(name))} adds the {self.kind} {name!r}, which is part of raypp; it is "
                          "left out", stacklevel=2)  # fmt: skip
        return entries

    def _load(self, entry: EntryPoint) -> type:
        try:
            method: type = entry.load()
        except Exception as error:  # a package may raise anything
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ConfigError(
                f"{self.kind} {entry.name!r} of {_package(entry)} cannot be loaded: {reason}; update or uninstall it"
            ) from error
        self._classes[entry.name] = self._with_options(entry.name, method)
        return method

    def _with_options(self, name: str, method: Method) -> Method:
        """Return a class with a model ``Options`` that has this name; raises ConfigError if it has another."""
        if not hasattr(method, "Options"):
            cast(Any, method).Options = create_model(
                "Options", __base__=MethodConfig, name=(cast(Any, Literal)[name], name)
            )
        stated = cast(Any, method).Options.model_fields["name"].default
        if stated != name:
            raise ConfigError(
                f"{self.kind} {name!r}: name in {method.__name__}.Options is {stated!r}; allowed is name: "
                f'Literal["{name}"] = "{name}"'
            )
        return method

    def options(self, name: str) -> type[MethodConfig]:
        model: type[MethodConfig] = self.get(name).Options
        return model

    def build(self, options: MethodConfig, /, *args: Any, **kwargs: Any) -> Any:
        """Construct the method that ``options.name`` selects."""
        return self.get(options.name)(options, *args, **kwargs)


def _package(entry: EntryPoint) -> str:
    return f"package {entry.dist.name!r}" if entry.dist is not None else "a package"


def suggest(word: str, known: Iterable[object]) -> str:
    """Return ``" (did you mean 'x'?)"`` with the closest known word, or an empty string."""
    close = difflib.get_close_matches(word, map(str, known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
