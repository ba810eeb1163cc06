"""Overrides: command-line flags such as ``--train.alpha 0.01``, merged over presets and files."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from typing import Any

from raypp.config.schema import Config, scaled_milestones
from raypp.utils.documents import DocumentError, load_yaml
from raypp.utils.errors import ConfigError
from raypp.utils.registry import suggest

Settings = Mapping[str, Any] | Sequence[str]
"""Settings as a nested or dotted mapping, or as words: ``--train.alpha 0.01``, ``--train.alpha=0.01`` or
``train.alpha=0.01``."""
ASSIGNMENT = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+)*=")


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


DOTTED = ("search", "space")  # whose keys name settings
COMMAND_OPTIONS = (
    "name", "config", "resume", "ray", "local", "quiet", "storage", "json", "dry_run", "suite", "attacks", "function",
    "folders", "preset", "track",
)  # fmt: skip
"""Command options that a misspelled flag may mean."""


def parse_overrides(flags: Settings, roots: Iterable[str] | None = None) -> dict[str, Any]:
    """Convert settings to a tree; dashes in keys are read as underscores.

    Args:
        flags: ``--a.b value``, ``--a.b=value`` or ``a.b=value``; or a nested or dotted mapping.
        roots: allowed first parts of a key; by default the sections of the configuration.

    Raises:
        ConfigError: a flag is invalid, or a setting is given twice.
    """
    sections = list(Config.model_fields if roots is None else roots)
    tree: dict[str, Any] = {}
    settings: dict[tuple[str, ...], Any] = {}
    parse = _parse_mapping(flags, sections) if isinstance(flags, Mapping) else _parse_words(flags, sections)
    for parts, value in parse:
        value = _expand_keys(value, parts)
        _add_setting(settings, tuple(parts), value)
        tree = deep_merge(tree, unflatten(parts, value))  # scales nothing, as no setting occurs twice
    return tree


def _parse_mapping(settings: Mapping[str, Any], sections: Sequence[str]) -> Iterable[tuple[list[str], Any]]:
    """Parts of the key and value of each setting of a mapping; text is parsed as on a command line."""
    for key, value in settings.items():
        yield _split_key(key, sections), _parse_value(value) if isinstance(value, str) else value


def _expand_keys(value: Any, path: Sequence[str]) -> Any:
    """Nest the dotted keys of a mapping at ``path``, as in ``{"train.epochs": 1}``; a search space has dotted keys."""
    if not isinstance(value, Mapping) or tuple(path) == DOTTED:
        return value
    tree: dict[str, Any] = {}
    for key, part in value.items():
        parts = str(key).split(".")
        tree = deep_merge(tree, unflatten(parts, _expand_keys(part, [*path, *parts])))
    return tree


def _parse_words(flags: Sequence[str], sections: Sequence[str]) -> Iterable[tuple[list[str], Any]]:
    """Parts of the key and value of each setting on a command line."""
    words = [flags] if isinstance(flags, str) else list(flags)
    while words:
        word = words.pop(0)
        if ASSIGNMENT.match(word):
            word = f"--{word}"
        if not word.startswith("--") or len(word) == 2:
            raise ConfigError(f"unexpected argument {word!r}; a setting is written --section.key VALUE")
        key, equals, text = word[2:].partition("=")
        parts = _split_key(key, sections)
        if not equals:
            text = _next_value(key, words)
        try:
            yield parts, _parse_value(text)
        except DocumentError as error:
            raise ConfigError(f"--{key} is {text!r}: {error}") from error


def _split_key(key: str, sections: Sequence[str]) -> list[str]:
    parts = str(key).replace("-", "_").split(".")
    if not all(parts):
        raise ConfigError(f"setting {key!r} has an empty part; it is written section.key")
    if parts[0] not in sections:
        raise ConfigError(_unknown_option(key, parts, sections))
    return parts


def _next_value(key: str, words: list[str]) -> str:
    if not words or words[0].startswith("--"):
        raise ConfigError(f"--{key} needs a value, as in --{key} VALUE")
    return words.pop(0)


def _unknown_option(key: str, parts: Sequence[str], sections: Sequence[str]) -> str:
    """The message for an unknown option, with the setting or option that the user may have meant."""
    from raypp.config.describe import setting_keys

    same_name = (name for name in setting_keys() if name.rpartition(".")[2] == parts[-1])
    leaves = sorted(name for name in same_name if name.partition(".")[0] in sections)
    options = [option.replace("_", "-") for option in COMMAND_OPTIONS if option not in parts]
    known = {section: f"--{'.'.join([section, *parts[1:]])}" for section in sections}
    known |= {option: f"--{option}" for option in options}
    close = difflib.get_close_matches(parts[0], known, n=1, cutoff=0.6)
    guesses = [f"--{leaf}" for leaf in leaves] or [known[name] for name in close]
    hint = f" (did you mean {' or '.join(guesses[:3])}?)" if guesses else ""
    return f"unknown option --{key}{hint}; settings begin with {', '.join(sections)}"


def resolve_keywords(
    settings: Settings, keywords: Mapping[str, Any], known: Mapping[str, Any], dictionary: str = "settings"
) -> dict[str, Any]:
    """Add keyword arguments to settings; each names a section or the last part of a setting's key.

    Args:
        known: a tree of all settings, in which keywords are looked up.
        dictionary: keyword that takes settings by their dotted keys, for messages.

    Raises:
        ConfigError: no setting has that name, or several have it.
    """
    tree = parse_overrides(settings, known)
    leaves = flatten_dict(dict(known))
    settings_by_key: dict[str, Any] = {}
    for name, value in keywords.items():
        keys = [name] if name in known else [key for key in leaves if key.rpartition(".")[2] == name]
        keys = keys or _sections(known, name)
        if len(keys) != 1:
            names = {key.rpartition(".")[2] for key in leaves}
            dotted = f"; pass {name.partition('.')[0]}={{...}}" if "." in name else ""
            problem = f"may be {' or '.join(keys)}" if keys else f"is not a setting{suggest(name, names)}"
            example = "{'section.key': value}"
            raise ConfigError(f"{name} {problem}{dotted or f'; pass {dictionary}={example}'}")
        settings_by_key[keys[0]] = value
    return deep_merge(tree, parse_overrides(settings_by_key, known))


def _sections(tree: Mapping[str, Any], name: str, prefix: str = "") -> list[str]:
    """Dotted keys of the nested sections with this name."""
    keys = []
    for key, value in tree.items():
        if isinstance(value, Mapping):
            keys += [prefix + key] if key == name else []
            keys += _sections(value, name, f"{prefix}{key}.")
    return keys


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
