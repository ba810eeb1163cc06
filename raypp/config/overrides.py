"""Overrides: command-line flags such as ``--train.alpha 0.01``, merged over presets and files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from raypp.config.schema import Config, scaled_milestones
from raypp.utils.documents import DocumentError, load_yaml
from raypp.utils.errors import ConfigError
from raypp.utils.registry import suggest


def deep_merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Return ``base`` overlaid by ``over``.

    A section whose ``name`` changes starts afresh, since other options apply. Milestones belong to the epochs that they
    are stated with: where ``over`` changes ``epochs`` and states no milestones, they keep their shares of the training.
    """
    return _deep_merge(base, over, scale=True)


def _deep_merge(base: dict[str, Any], over: dict[str, Any], *, scale: bool) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        # A bare name stands for {name: ...}, in whichever order a name and its options come.
        if isinstance(old, str) and isinstance(value, dict):
            old = {"name": old}
        if isinstance(old, dict) and isinstance(value, str):
            value = {"name": value}
        if isinstance(old, dict) and isinstance(value, dict):
            fresh = "name" in value and "name" in old and value["name"] != old["name"]
            merged[key] = value if fresh else _deep_merge(old, value, scale=scale)
        else:
            merged[key] = value
    return _with_scaled_milestones(base, over, merged) if scale else merged


def _with_scaled_milestones(base: dict[str, Any], over: dict[str, Any], merged: dict[str, Any]) -> dict[str, Any]:
    """``merged`` with the milestones of ``base`` moved to the epochs of ``over``, where both are stated."""
    old, new, schedule, changes = base.get("epochs"), over.get("epochs"), merged.get("schedule"), over.get("schedule")
    if not isinstance(schedule, dict) or (isinstance(changes, dict) and "milestones" in changes):
        return merged
    try:
        milestones = scaled_milestones([float(m) for m in schedule["milestones"]], int(str(old)), int(str(new)))
    except (KeyError, TypeError, ValueError, ZeroDivisionError):  # nothing to scale, or what validation refuses
        return merged
    return merged | {"schedule": schedule | {"milestones": milestones}}


def flatten_dict(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return ``{"section.key": value}`` for every leaf of a tree."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten_dict(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


COMMAND_OPTIONS = ("name", "config", "resume", "local", "quiet", "storage")
"""Options of commands that take settings as well: a misspelt one arrives here."""


def parse_overrides(flags: Sequence[str], roots: Iterable[str] | None = None) -> dict[str, Any]:
    """Turn ``--a.b value`` and ``--a.b=value`` into a tree; dashes in keys are read as underscores.

    Args:
        roots: what a key may begin with; by default a section of the configuration.

    Raises:
        ConfigError: a flag is not understood, or a setting is given twice.
    """
    known = list(Config.model_fields if roots is None else roots)
    tree: dict[str, Any] = {}
    settings: dict[tuple[str, ...], Any] = {}
    rest = list(flags)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--") or len(flag) == 2:
            raise ConfigError(f"unexpected argument {flag!r}; a setting is written --section.key VALUE")
        key, equals, text = flag[2:].partition("=")
        parts = key.replace("-", "_").split(".")
        if parts[0] not in known:
            raise ConfigError(
                f"unknown option --{key}{suggest(parts[0], [*known, *COMMAND_OPTIONS])}; settings begin with "
                f"{', '.join(known)}"
            )
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"--{key} needs a value, as in --{key} VALUE")
            text = rest.pop(0)
        try:
            value = _value(text)
        except DocumentError as error:
            raise ConfigError(f"--{key} is {text!r}: {error}") from error
        _add_settings(settings, tuple(parts), value)
        tree = _deep_merge(tree, unflatten(parts, value), scale=False)  # all flags are stated together
    return tree


def _add_settings(settings: dict[tuple[str, ...], Any], path: tuple[str, ...], value: Any) -> None:
    """Add what a flag sets to what others set, by paths of keys; raises ConfigError for a setting that is there."""
    if isinstance(value, dict):
        for key, part in value.items():
            _add_settings(settings, (*path, *key.split(".")), part)
        return
    for earlier, earlier_value in settings.items():
        (outer, name), (inner, _) = sorted([(earlier, earlier_value), (path, value)], key=lambda pair: len(pair[0]))
        if inner[: len(outer)] != outer:
            continue
        # A bare name stands for {name: ...}, whose other keys may be given by themselves; null leaves a section out.
        if inner != outer and isinstance(name, str | None) and inner[len(outer)] != "name":
            continue
        raise ConfigError(
            f"{'.'.join(inner)} is given twice, first as {earlier_value}, then as {value}; allowed is once"
        )
    settings[path] = value


def _value(text: str) -> Any:
    """A flag's value: lists and mappings are YAML, ``null`` is none, all else is text that its setting converts."""
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
    for part in reversed(parts):
        value = {part: value}
    nested: dict[str, Any] = value
    return nested
