"""The application, and what its commands share."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

import raypp
from raypp.utils.errors import ConfigError

app = App(
    name="raypp",
    suppress_keyboard_interrupt=False,  # main says how to go on
    version=raypp.__version__,
    help="Train image protections with their classifiers on Ray, measure what they leak, and use them.",
)
data_app = App(name="data", help="Data sources: list them, convert them to Parquet, check their integrity.")
app.command(data_app)

Settings = Annotated[str, Parameter(allow_leading_hyphen=True, show=False)]
# What names the thing itself; settings may stand before it.
First = Annotated[str, Parameter(allow_leading_hyphen=True)]
SETTINGS_HELP = (
    "Any setting of the configuration is a flag: --train.alpha 0.01 --data.source.name parquet. "
    "`raypp config PRESET` prints them all with their values."
)

ATTACK_HELP = (
    "Any setting of the suite is a flag, as --num_queries 500, any of an attack by its name, as "
    "--inverse.train.epochs 5, and any of the images, as --data.source.path FOLDER."
)


def preset_and_flags(first: str, more: tuple[str, ...]) -> tuple[str, list[str]]:
    """The preset among a command's words, wherever it stands, and all others, which have to be settings."""
    others, settings = without_settings((first, *more))
    if not others:
        raise ConfigError(f"no preset is given; `raypp config` lists them, and a setting such as {first} needs a value")
    return others[0], [*others[1:], *settings]


def without_settings(words: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Split words into those that stand for themselves and settings, ``--name VALUE`` or ``--name=VALUE``."""
    others: list[str] = []
    settings: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            others.append(word)
            continue
        settings.append(word)
        if "=" not in word and rest and not rest[0].startswith("--"):
            settings.append(rest.pop(0))
    return others, settings


def import_from_ray(module: str, function: str, instead: str = "--local trains in this process without it") -> Any:
    """A function that needs Ray, or one sentence where Ray is not installed or its cluster does not answer."""
    try:
        importlib.import_module("raypp.cluster.session").check_address()
        return getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "ray":
            raise
        raise ConfigError(f"Ray is not installed here; {instead}") from None


def new_name(preset: str) -> str:
    from datetime import datetime

    return f"{Path(preset).stem}-{datetime.now():%Y%m%d-%H%M%S}"
