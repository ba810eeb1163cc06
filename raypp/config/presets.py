"""Presets and YAML files, merged with overrides into one validated configuration."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from raypp.config.overrides import Settings, deep_merge, parse_overrides
from raypp.config.schema import Config
from raypp.config.validation import check_milestones, validate
from raypp.utils.documents import DocumentError, load_yaml
from raypp.utils.errors import ConfigError
from raypp.utils.registry import suggest

Files = str | Path | Sequence[str | Path]
"""One YAML file with settings, or several."""
EXTRA_SECTIONS = ("search",)
"""Sections of a preset that only other commands (``raypp tune``) read."""


def presets() -> dict[str, Path]:
    """Files of the presets in this package, by name."""
    folder = Path(str(resources.files("raypp") / "presets"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def describe_presets() -> dict[str, str]:
    """The first comment line of each preset."""
    return {name: path.read_text().splitlines()[0].lstrip("# ") for name, path in presets().items()}


def load_config(preset: str | Path, files: Files = (), flags: Settings = (), defaults: Settings = ()) -> Config:
    """Merge a preset, YAML files and settings, and validate.

    Args:
        preset: name of a preset, or path of a YAML file.
        files: YAML files; later ones have priority.
        flags: settings, which override the files.
        defaults: settings that override the preset, and that files and flags override.

    ConfigError is raised for the first error; it names the key, the value and the allowed values.
    """
    config = validate(load_tree(preset, files, flags, defaults=defaults))
    check_milestones(config.train, "train")
    return config


def load_tree(
    preset: str | Path,
    files: Files = (),
    flags: Settings = (),
    more: tuple[str, ...] = (),
    defaults: Settings = (),
) -> dict[str, Any]:
    """Merge as :func:`load_config` does, without validation; raises ConfigError for an unreadable file or flag.

    Sections of ``EXTRA_SECTIONS`` are dropped, and not allowed in flags, except those in ``more``.
    """
    shipped = presets()
    if str(preset) in shipped:
        tree = read_yaml(shipped[str(preset)])
    elif Path(preset).suffix in {".yaml", ".yml"}:
        tree = read_yaml(Path(preset))
    else:
        raise ConfigError(
            f"unknown preset {str(preset)!r}{suggest(str(preset), shipped)}; "
            f"allowed: {', '.join(shipped)}, or the path of a .yaml file"
        )
    tree = deep_merge(tree, parse_overrides(defaults))
    for file in [files] if isinstance(files, str | Path) else files:
        tree = deep_merge(tree, read_yaml(Path(file)))
    tree = {key: value for key, value in tree.items() if key not in EXTRA_SECTIONS or key in more}
    return deep_merge(tree, parse_overrides(flags, (*Config.model_fields, *more)))


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping; raises ConfigError."""
    try:
        tree = load_yaml(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"config file {str(path)!r} cannot be read: {error.strerror}") from error
    except DocumentError as error:
        problem = "is no valid YAML" if error.syntax else "is not understood"
        raise ConfigError(f"config file {str(path)!r} {problem}: {error}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"config file {str(path)!r} holds a {type(tree).__name__}; allowed is a mapping of sections")
    return tree
