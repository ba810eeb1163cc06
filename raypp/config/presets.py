"""Presets and YAML files, merged with overrides into one validated configuration."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from raypp.config.overrides import deep_merge, parse_overrides
from raypp.config.schema import Config
from raypp.config.validation import check_milestones, validate
from raypp.utils.documents import DocumentError, load_yaml
from raypp.utils.errors import ConfigError
from raypp.utils.registry import suggest

EXTRA_SECTIONS = ("search",)
"""Sections of a preset that only other commands (``raypp tune``) read."""


def presets() -> dict[str, Path]:
    """Files of the presets in this package, by name."""
    folder = Path(str(resources.files("raypp") / "presets"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_config(preset: str | Path, file: str | Path | None = None, flags: tuple[str, ...] | list[str] = ()) -> Config:
    """Merge a preset (a name or a YAML path), an optional YAML file and flags ``--train.alpha 0.01``, and validate.

    ConfigError is raised for the first error; it names the key, the value and the allowed values.
    """
    config = validate(load_tree(preset, file, flags))
    check_milestones(config.train, "train")
    return config


def load_tree(
    preset: str | Path, file: str | Path | None = None, flags: Sequence[str] = (), more: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Merge as :func:`load_config` does, without validation; raises ConfigError for an unreadable file or flag.

    Sections of ``EXTRA_SECTIONS`` are dropped, and not allowed in flags, except those in ``more``.
    """
    files = presets()
    if str(preset) in files:
        tree = read_yaml(files[str(preset)])
    elif Path(preset).suffix in {".yaml", ".yml"}:
        tree = read_yaml(Path(preset))
    else:
        raise ConfigError(
            f"unknown preset {str(preset)!r}{suggest(str(preset), files)}; "
            f"allowed: {', '.join(files)}, or the path of a .yaml file"
        )
    if file is not None:
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
