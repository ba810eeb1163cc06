"""Decisions that commands share: settings and names of runs, the default suite, and whether work runs on Ray."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raypp.config.overrides import Settings, resolve_keywords
from raypp.config.presets import Files, load_config
from raypp.utils.errors import ConfigError
from raypp.utils.storage import Storage

if TYPE_CHECKING:
    from raypp.config.schema import Cluster, Config


def as_list(names: str | Sequence[str]) -> list[str]:
    """One name or several, as a list."""
    return [names] if isinstance(names, str) else list(names)


def default_suite() -> str:
    """``quick`` on a machine without a GPU, else ``small``."""
    from raypp.utils.device import num_gpus

    return "small" if num_gpus() else "quick"


def new_name(stem: str | Path, storage: str | Path) -> str:
    """A name for a new run that no folder in ``storage`` has: stem, date and time."""
    name = f"{Path(stem).stem}-{datetime.now():%Y%m%d-%H%M%S}"
    taken, number = Storage(storage), 2
    unique = name
    while taken.folder(unique).exists():
        unique, number = f"{name}-{number}", number + 1
    return unique


def run_name(name: str | None, stem: str | Path, storage: str | Path, *, resume: bool, what: str) -> str:
    """The name of a run: ``name``, or a new one; raises ConfigError on resume without a name."""
    if name is None and resume:
        raise ConfigError(f"--resume needs --name, the {what} to continue")
    return new_name(stem, storage) if name is None else name


def split_folder(out: str | Path, *, name: str | None, storage: str | Path | None) -> tuple[str, str]:
    """The name and the storage of the run in the folder ``out``; raises ConfigError if either is set too."""
    if name is not None or storage is not None:
        raise ConfigError(
            f"out and {'name' if name is not None else 'storage'} are both set; out is the run's folder, in place of "
            "name and storage"
        )
    folder = Storage(out)
    return folder.name, folder.parent.uri


def training_config(
    preset: str | Path,
    settings: Settings = (),
    *,
    storage: str | Path | None = None,
    config: Files = (),
    defaults: Settings = (),
    **keywords: Any,
) -> Config:
    """Merge and validate the settings of a run, see :func:`raypp.train`; ``defaults`` override the preset only."""
    if storage is not None:
        keywords = {"storage": str(storage)} | keywords
    if keywords:
        known = load_config(preset, config, settings, defaults).model_dump(mode="json")
        settings = resolve_keywords(settings, keywords, known)
    return load_config(preset, config, settings, defaults)


def uses_ray(ray: bool | None, cluster: Cluster, *, stream: bool = False) -> bool:
    """Whether to run on Ray: as ``ray`` says, and for None where more than one process gains or only Ray can."""
    if ray is not None:
        return ray
    if os.environ.get("RAY_ADDRESS") or stream or (cluster.num_workers or 1) > 1:
        return True
    from raypp.utils.device import num_gpus

    return num_gpus() > 1


def import_from_ray(
    module: str, function: str, instead: str = "without it, work runs in this process (--local)"
) -> Any:
    """Import a function that needs Ray; raises ConfigError if Ray is not installed or its cluster does not answer."""
    try:
        importlib.import_module("raypp.cluster.session").check_address()
        return getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "ray":
            raise
        raise ConfigError(f"Ray is not installed here; {instead}") from None
