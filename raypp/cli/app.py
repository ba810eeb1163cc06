"""The application and the helpers that its commands share."""

from __future__ import annotations

import importlib
from datetime import datetime
from typing import Annotated, Any

from cyclopts import App, Parameter

import raypp
from raypp.utils.errors import ConfigError

app = App(
    name="raypp",
    suppress_keyboard_interrupt=False,  # main prints how to continue
    version=raypp.__version__,
    help="Train image protections with their classifiers on Ray, measure their leakage, and use them.",
)
data_app = App(name="data", help="Data sources: list them, convert them to Parquet, check their integrity.")
app.command(data_app)

Settings = Annotated[str, Parameter(allow_leading_hyphen=True, show=False)]
# A positional argument that settings may precede.
First = Annotated[str, Parameter(allow_leading_hyphen=True)]
SETTINGS_HELP = (
    "Any setting of the configuration is a flag: --train.alpha 0.01 --data.source.name parquet. "
    "`raypp config PRESET` prints them all with their values."
)
ATTACK_HELP = (
    "Flags set any setting of the suite (--num_queries 500), of an attack by its name (--inverse.train.epochs 5), and "
    "of the images (--data.source.path FOLDER)."
)


def preset_and_flags(first: str, more: tuple[str, ...]) -> tuple[str, list[str]]:
    """Return the preset, wherever it stands in a command's words, and the other words."""
    positional, settings = without_settings((first, *more))
    if not positional:
        raise ConfigError(f"no preset is given; `raypp config` lists them, and a setting such as {first} needs a value")
    return positional[0], [*positional[1:], *settings]


def without_settings(words: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Split words into positional ones and settings, ``--name VALUE`` or ``--name=VALUE``."""
    positional: list[str] = []
    settings: list[str] = []
    is_value = False
    for word in words:
        is_name = word.startswith("--")
        (settings if is_name or is_value else positional).append(word)
        is_value = is_name and "=" not in word
    return positional, settings


def import_from_ray(module: str, function: str, instead: str = "--local trains in this process without it") -> Any:
    """Import a function that needs Ray; raises ConfigError if Ray is not installed or its cluster does not answer."""
    try:
        importlib.import_module("raypp.cluster.session").check_address()
        return getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "ray":
            raise
        raise ConfigError(f"Ray is not installed here; {instead}") from None


def run_name(name: str | None, default: str, *, resume: bool = False, what: str = "run") -> str:
    """The name of a run: ``default`` with date and time if there is no ``name``; raises ConfigError on resume."""
    if name is None and resume:
        raise ConfigError(f"--resume needs --name, the {what} to continue")
    return f"{default}-{datetime.now():%Y%m%d-%H%M%S}" if name is None else name
