"""Run folders: names, locks, settings that may change on resume, and the environment of a run."""

from __future__ import annotations

import contextlib
import json
import platform
import re
import subprocess
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import raypp
from raypp.config.overrides import flatten_dict
from raypp.config.schema import Config, scaled_milestones
from raypp.config.validation import validate
from raypp.training.checkpoint import EpochMetrics, list_checkpoints
from raypp.training.protected_classifier import phases, uses_features
from raypp.utils import runtime
from raypp.utils.device import num_gpus
from raypp.utils.documents import DocumentError, load_json, load_yaml
from raypp.utils.errors import ConfigError, StorageError
from raypp.utils.storage import Storage

MUTABLE_ON_RESUME = (
    "train.epochs", "train.eval_batch_size", "train.checkpoint_seconds", "train.adapt_threads", "data.num_test",
    "data.stream_mib_per_worker",
    "features.fallback",  # resolved when the run starts
    "metrics",
    "cluster",
)  # fmt: skip
"""Settings of length and hardware, which may change when a run is resumed."""
MILESTONES = "train.schedule.milestones"
OWN_FILES = {".lock", "features.safetensors", "private"}
"""Files that a run writes before run.json."""
LATEST = "latest"  # link to the run that finished last


def environment() -> dict[str, Any]:
    """Versions, the commit of the code where it is known, and the hardware of this process."""
    versions = {"raypp": raypp.__version__, "python": platform.python_version()}
    for package in ("torch", "torchvision", "ray", "numpy", "pillow", "pyarrow"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    gpus = num_gpus()
    return {
        "versions": versions,
        "commit": commit(Path(raypp.__file__).parents[1]),
        "platform": platform.platform(),
        "hardware": f"{torch.cuda.get_device_name()} x {gpus}" if gpus else cpu_name(),
        "threads": torch.get_num_threads(),
    }


@cache
def commit(checkout: Path) -> str | None:
    """Commit of a git checkout, with ``-dirty`` if files have changed since; None without a checkout or without git."""
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def cpu_name() -> str:
    """Processor name, and the number of cores that this process may use."""
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    name = model[1].strip() if model else platform.processor() or platform.machine()
    return f"{name}, {runtime.num_cores()} cores"


def describe_feature_network(config: Config) -> str:
    if not uses_features(config):
        return "none"
    options = config.features.model_dump(mode="json")
    name, layer = options.pop("name"), options.pop("layer", "early block")
    options.pop("fallback", None)  # the name is that of the network in use
    details = ", ".join(f"{key} {value}" for key, value in options.items())
    return f"{name}, {layer}" + (f" ({details})" if details else "")


def ensure_free(storage: Storage, name: str) -> None:
    """Raise StorageError if a folder holds a run or foreign files.

    A run that stopped before its first checkpoint may be overwritten. The caller holds the lock, so the second of two
    simultaneous runs is refused.
    """
    has_started = storage.exists("config.yaml") and (storage.exists("summary.json") or list_checkpoints(storage))
    is_run = storage.exists("run.json")
    foreign = storage.local and not is_run and {path.name for path in storage.path.iterdir()} - OWN_FILES
    if has_started or foreign:
        raise StorageError(
            f"run {name!r} exists already in {storage.uri}; --resume continues it, another --name starts a new one"
        )


@contextmanager
def lock(storage: Storage, owner: str, *, wait: bool = False) -> Iterator[None]:
    """Keep other processes out of a folder. The lock ends with this process; object stores have no locks.

    Args:
        owner: what the folder holds ("run 'x'"), for the error if another process has the lock.
        wait: wait for the other process instead. This lock's file lies next to the folder, which may be replaced.
    """
    if not storage.local:
        yield
        return
    import fcntl

    path = storage.path.with_name(f".{storage.path.name}.lock") if wait else storage.path / ".lock"
    try:
        file = path.open("a")
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StorageError(f"{owner} is in use by another process; wait for it or take another --name") from None
        yield


def refuse_foreign(storage: Storage, owner: str) -> None:
    """Raise StorageError if the folder for a new ``owner`` ("a search") holds any file."""
    if others := sorted(set(storage.names()) - {".lock"}):
        raise StorageError(
            f"{storage.uri} holds {others[0]!r}, which {owner} has not written; take another --name, or an empty folder"
        )


def refuse_changes(storage: Storage, settings: Iterable[tuple[str, Any, Any]]) -> None:
    """Raise StorageError for the first of the settings (name, stored value, new value) that has changed."""
    for name, stored, new in settings:
        if stored != new:
            raise StorageError(
                f"{storage.uri} was started with another {name}; resume it with the same, or take another --name"
            )


def validate_name(name: str) -> str:
    """Return the name of a run or a table; raises StorageError if it is not allowed."""
    if name == LATEST:
        raise StorageError(f"run name {LATEST!r} is not allowed: it is the link to the run that finished last")
    if not name or name.startswith(".") or not all(c.isalnum() or c in "-_.+" for c in name):
        raise StorageError(
            f"run name {name!r} is not allowed; use letters, digits and - _ . +, not beginning with a dot"
        )
    return name


def point_latest(run: Storage) -> None:
    """Point the link ``latest`` in the parent folder to a finished run, by one rename.

    Does nothing on object stores, on file systems without links, and where another file has that name.
    """
    if not run.local:
        return
    link = run.path.with_name(LATEST)
    temporary = link.with_name(f".{LATEST}.{uuid.uuid4().hex[:8]}.tmp")
    if link.exists() and not link.is_symlink():
        return
    try:
        temporary.symlink_to(run.path.name)
        temporary.replace(link)
    except OSError:
        temporary.unlink(missing_ok=True)


def check_resumable(config: Config, stored: dict[str, Any], run: Storage, name: str) -> None:
    """Raise StorageError unless ``config`` may continue a run that was started with the ``stored`` configuration."""
    with contextlib.suppress(ConfigError):  # settings that are newer than the run have their default
        stored = validate(stored).model_dump(mode="json")
    new, old = flatten_dict(config.model_dump(mode="json")), flatten_dict(stored)
    if new["train.epochs"] < old.get("train.epochs", 0):
        trained = _num_trained_epochs(run, phases(config)[-1].name)
        if new["train.epochs"] < trained:
            raise StorageError(
                f"run {name!r} has trained {trained} epochs, train.epochs is {new['train.epochs']}; a run can end "
                "sooner than it was started for, but not before the epochs that it has trained"
            )
    if old.get(MILESTONES) is not None and new.get(MILESTONES) is not None:
        # Milestones scale with the epochs, as the other schedules do.
        scaled = scaled_milestones(old[MILESTONES], old["train.epochs"], new["train.epochs"])
        old[MILESTONES] = scaled if new[MILESTONES] == scaled else old[MILESTONES]
    for key in sorted(new.keys() | old.keys()):
        if any(key == mutable or key.startswith(mutable + ".") for mutable in MUTABLE_ON_RESUME):
            continue
        if new.get(key) != old.get(key):
            raise StorageError(
                f"run {name!r} was started with {key} = {old.get(key)!r}, now it is {new.get(key)!r}; "
                "resume it with the same configuration or start a new run with another --name"
            )


def _num_trained_epochs(run: Storage, phase: str) -> int:
    try:
        return max((row["epoch"] for row in read_history(run) if row["phase"] == phase), default=0)
    except (TypeError, KeyError) as error:
        raise StorageError(f"{run.uri}: metrics.jsonl is damaged: {error}") from error


def read_history(run: Storage) -> list[EpochMetrics]:
    """Metrics of each epoch so far; raises StorageError if their file is damaged."""
    lines = run.read("metrics.jsonl").splitlines() if run.exists("metrics.jsonl") else []
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise StorageError(f"{run.uri}: metrics.jsonl is damaged: {error}") from error


def read_checked(storage: Storage, file: str, *keys: str) -> dict[str, Any]:
    """Read a YAML or JSON file of a run; raises StorageError if it is damaged or lacks a key."""
    load = load_json if file.endswith(".json") else load_yaml
    try:
        tree = load(storage.read(file))
    except DocumentError as error:
        raise StorageError(f"{storage.uri}/{file} is damaged: {error}") from error
    if not isinstance(tree, dict):
        raise StorageError(f"{storage.uri}/{file} is damaged: it holds no mapping")
    if missing := [key for key in keys if key not in tree]:
        raise StorageError(f"{storage.uri}/{file} is damaged: it lacks {missing[0]!r}")
    return tree
