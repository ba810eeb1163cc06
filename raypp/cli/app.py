"""The application, its command groups, and the parameters that its commands share."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Group, Parameter

import raypp
from raypp.utils.errors import ConfigError
from raypp.utils.runtime import VERBOSE

START, TRAIN, EVALUATE, USE, OPERATE = (
    Group.create_ordered(name) for name in ("Start", "Train", "Evaluate", "Use", "Operate")
)
SETTINGS_HELP = (
    "Any setting of the configuration is a flag: --train.alpha 0.01 or train.alpha=0.01. `raypp config PRESET` prints "
    "them with their values, and --explain what they mean."
)
ATTACK_HELP = (
    "Flags set any setting of the suite (--num_queries 500), of an attack by its name (--inverse.train.epochs 5), and "
    "of the images (--data.source.path FOLDER)."
)
RESUME_OPTIONS = "resume_options"  # attribute of an interrupt: options by name
EXIT_CODES = "Exit codes: 0 done, 1 failure at run time, 2 usage or bad input, 130 Ctrl-C, 143 SIGTERM."


def epilogue(*examples: str, text: str = "") -> str:
    """The end of a command's help: examples of its use, then a remark."""
    lines = "\n".join(f"- `raypp {example}`" for example in examples)
    return f"**Examples**\n\n{lines}\n" + (f"\n{text}" if text else "")


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    versions = []
    for package in ("torch", "ray"):
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            versions.append(f"no {package}")
    return f"raypp {raypp.__version__} ({', '.join(versions)})"


app = App(
    name="raypp",
    suppress_keyboard_interrupt=False,  # main prints how to continue
    version=_version,
    help="Train image protections with their classifiers on Ray, measure their leakage, and use them.",
    help_epilogue=epilogue(
        "quickstart", "train cifar10-small --train.epochs 2", "attack runs/latest", "serve runs/latest", text=EXIT_CODES
    ),
    default_parameter=Parameter(negative="", show_default=lambda value: None if value in (None, False) else value),
)
data_app = App(name="data", group=TRAIN, help="Convert data sources to Parquet and check their integrity.")
app.command(data_app)
app.register_install_completion_command()

Settings = Annotated[str, Parameter(allow_leading_hyphen=True, show=False)]
# A positional argument that settings may precede.
First = Annotated[str, Parameter(allow_leading_hyphen=True)]
OnRay = Annotated[bool | None, Parameter(negative="--local")]
Words = Annotated[list[str] | None, Parameter(consume_multiple=True)]
ConfigFiles = Annotated[list[Path] | None, Parameter(name="--config")]
Trackers = Annotated[list[str] | None, Parameter(name="--track")]
AsJson = Annotated[bool, Parameter(name="--json")]


@contextmanager
def resumable(name: str) -> Iterator[None]:
    """Give an interrupt of the run ``name`` the options that continue it, for the message of :func:`main`."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        setattr(interrupt, RESUME_OPTIONS, {"--name": name, "--resume": ""})
        raise


def set_verbosity(*, verbose: bool, quiet: bool = False) -> None:
    """Have Ray's own log lines printed if ``verbose`` is set; raises ConfigError if ``quiet`` is set too."""
    if verbose and quiet:
        raise ConfigError("--quiet and --verbose exclude each other; give one of them")
    if verbose:
        os.environ[VERBOSE] = "1"  # a Ray that starts here hands it to its workers


def preset_and_flags(first: str, more: tuple[str, ...]) -> tuple[str, list[str]]:
    """Return the preset, wherever it stands in a command's words, and the other words."""
    positional, settings = without_settings((first, *more))
    if not positional:
        raise ConfigError(f"no preset is given; `raypp config` lists them, and a setting such as {first} needs a value")
    return positional[0], [*positional[1:], *settings]


def without_settings(words: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Split words into positional ones and settings: ``--name VALUE``, ``--name=VALUE`` or ``name=VALUE``."""
    from raypp.config.overrides import ASSIGNMENT

    positional: list[str] = []
    settings: list[str] = []
    remaining = list(words)
    while remaining:
        word = remaining.pop(0)
        if not word.startswith("--") and not ASSIGNMENT.match(word):
            positional.append(word)
            continue
        settings.append(word)
        if "=" not in word and remaining and not remaining[0].startswith("--"):
            settings.append(remaining.pop(0))
    return positional, settings


def print_json(document: Any) -> None:
    """Print one JSON document on standard output."""
    sys.stdout.write(json.dumps(document, indent=2, default=str) + "\n")
