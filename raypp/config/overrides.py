"""Overrides: command-line flags such as ``--train.alpha 0.01``, merged over presets and files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce
from typing import Any

from raypp.config.schema import Config, scaled_milestones
from raypp.utils.documents import DocumentError, load_yaml
from raypp.utils.errors import ConfigError
from raypp.utils.registry import suggest


def deep_merge(base: dict[str, Any], override: dict[str, Any]) -> dict[str, Any]:
    """Merge ``override`` into a copy of ``base``.

    A section whose ``name`` changes replaces the old one, since other options apply. If ``override`` changes ``epochs``
    and sets no milestones, the milestones of ``base`` are scaled to the new number of epochs.
    """
    merged = dict(base)
    for key, value in override.items():
        old = merged.get(key)
        # A bare name stands for {name: ...}, whether the name or its options come first.
        if isinstance(old, str) and isinstance(value, dict):
            old = {"name": old}
        if isinstance(old, dict) and isinstance(value, str):
            value = {"name": value}
        merged[key] = value
        if isinstance(old, dict) and isinstance(value, dict):
            renamed = "name" in value and "name" in old and value["name"] != old["name"]
            if not renamed:
                merged[key] = deep_merge(old, value)
    return _with_scaled_milestones(base, override, merged)


def _with_scaled_milestones(base: dict[str, Any], override: dict[str, Any], merged: dict[str, Any]) -> dict[str, Any]:
    """Scale the milestones of ``base`` in ``merged`` to the epochs of ``override``, if both have epochs."""
    schedule, changes = merged.get("schedule"), override.get("schedule")
    if not isinstance(schedule, dict) or (isinstance(changes, dict) and "milestones" in changes):
        return merged
    old_epochs, new_epochs = str(base.get("epochs")), str(override.get("epochs"))
    try:
        milestones = scaled_milestones([float(m) for m in schedule["milestones"]], int(old_epochs), int(new_epochs))
    except (KeyError, TypeError, ValueError, ZeroDivisionError):  # nothing to scale, or validation rejects it later
        return merged
    return merged | {"schedule": schedule | {"milestones": milestones}}


def flatten_dict(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return ``{"section.key": value}`` for every leaf of a tree."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten_dict(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


COMMAND_OPTIONS = ("name", "config", "resume", "local", "quiet", "storage")
"""Command options that a misspelled flag may mean."""


def parse_overrides(flags: Sequence[str], roots: Iterable[str] | None = None) -> dict[str, Any]:
    """Convert ``--a.b value`` and ``--a.b=value`` to a tree; dashes in keys are read as underscores.

    A key begins with one of ``roots``, by default the sections of the configuration. ConfigError is raised for an
    invalid flag, or a setting that occurs twice.
    """
    sections = list(Config.model_fields if roots is None else roots)
    tree: dict[str, Any] = {}
    settings: dict[tuple[str, ...], Any] = {}
    words = list(flags)
    while words:
        flag = words.pop(0)
        if not flag.startswith("--") or len(flag) == 2:
            raise ConfigError(f"unexpected argument {flag!r}; a setting is written --section.key VALUE")
        key, equals, text = flag[2:].partition("=")
        parts = key.replace("-", "_").split(".")
        if parts[0] not in sections:
            raise ConfigError(
                f"unknown option --{key}{suggest(parts[0], [*sections, *COMMAND_OPTIONS])}; settings begin with "
                f"{', '.join(sections)}"
            )
        if not equals:
            if not words or words[0].startswith("--"):
                raise ConfigError(f"--{key} needs a value, as in --{key} VALUE")
            text = words.pop(0)
        try:
            value = _parse_value(text)
        except DocumentError as error:
            raise ConfigError(f"--{key} is {text!r}: {error}") from error
        _add_setting(settings, tuple(parts), value)
        tree = deep_merge(tree, unflatten(parts, value))  # scales nothing, as no setting occurs twice
    return tree


def _add_setting(settings: dict[tuple[str, ...], Any], path: tuple[str, ...], value: Any) -> None:
    """Add a flag's leaves to ``settings`` by path of keys; raises ConfigError for a setting that is there already."""
    if isinstance(value, dict):
        for key, part in value.items():
            _add_setting(settings, (*path, *key.split(".")), part)
        return
    for other_path, other_value in settings.items():
        settings_by_length = sorted([(other_path, other_value), (path, value)], key=lambda setting: len(setting[0]))
        (outer, outer_value), (inner, _) = settings_by_length
        if inner[: len(outer)] != outer:
            continue
        # A bare name stands for {name: ...}, so its other keys may follow; so may those of a null section.
        if inner != outer and isinstance(outer_value, str | None) and inner[len(outer)] != "name":
            continue
        raise ConfigError(f"{'.'.join(inner)} is given twice, first as {other_value}, then as {value}; allowed is once")
    settings[path] = value


def _parse_value(text: str) -> Any:
    """Parse lists and mappings as YAML and ``null`` as None; other text is converted by validation."""
    if text == "null":
        return None
    if text.startswith(("[", "{")):
        try:
            return load_yaml(text)
        except DocumentError as error:
            if not error.syntax:
                raise
    return text


def unflatten(parts: Sequence[str], value: Any) -> dict[str, Any]:
    """Return ``{"a": {"b": value}}`` for the parts a and b."""
    tree: dict[str, Any] = reduce(lambda nested, part: {part: nested}, reversed(parts), value)
    return tree
