"""Run folders: names, locks, what may change on resume, and the environment of a run."""

from __future__ import annotations

import contextlib
import json
import platform
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import torch

import raypp
from raypp.config.overrides import flatten_dict
from raypp.config.schema import Config, scaled_milestones
from raypp.config.validation import validate
from raypp.training.checkpoint import list_checkpoints
from raypp.training.protected_classifier import phases, uses_features
from raypp.utils import runtime
from raypp.utils.documents import DocumentError, load_json, load_yaml
from raypp.utils.errors import ConfigError, StorageError
from raypp.utils.storage import Storage

# What may differ when a run is resumed: how long, and on what; everything else would make it another run.
MUTABLE_ON_RESUME = (
    "train.epochs",
    "train.eval_batch_size",
    "train.checkpoint_seconds",
    "train.adapt_threads",
    "data.num_test",
    "features.fallback",  # settled when the run began
    "cluster",
)
MILESTONES = "train.schedule.milestones"
# Files that a run has before its configuration is written.
OWN_FILES = {".lock", "run.json", "features.safetensors", "private"}
LATEST = "latest"  # the link beside runs that names the one that finished last


def environment() -> dict[str, Any]:
    """Versions and hardware of this process."""
    versions = {"raypp": raypp.__version__, "python": platform.python_version()}
    for package in ("torch", "torchvision", "ray", "numpy", "pillow", "pyarrow"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    cuda = torch.cuda.is_available()
    return {
        "versions": versions,
        "platform": platform.platform(),
        "hardware": f"{torch.cuda.get_device_name()} x {torch.cuda.device_count()}" if cuda else cpu_name(),
        "threads": torch.get_num_threads(),
    }


def cpu_name() -> str:
    """The processor and how many cores this process may use."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    return f"{name}, {runtime.num_cores()} cores"


def describe_feature_network(config: Config) -> str:
    if not uses_features(config):
        return "none"
    options = config.features.model_dump(mode="json")
    name, layer = options.pop("name"), options.pop("layer", "early block")
    options.pop("fallback", None)  # what was taken in the end is named
    told = ", ".join(f"{key} {value}" for key, value in options.items())
    return f"{name}, {layer}" + (f" ({told})" if told else "")


def ensure_free(storage: Storage, name: str) -> None:
    """Refuse a folder that holds work, or anything that is not a run's; one that stopped before its first checkpoint
    is free. Whoever asks holds the lock, so of two runs that start at once the second finds it taken or in use."""
    begun = storage.exists("config.yaml") and (storage.exists("summary.json") or list_checkpoints(storage))
    # A run has run.json before anything else that bears a common name.
    ours = storage.exists("run.json")
    foreign = storage.local and not ours and {p.name for p in storage.path.iterdir()} - (OWN_FILES - {"run.json"})
    if begun or foreign:
        raise StorageError(
            f"run {name!r} exists already in {storage.uri}; --resume continues it, another --name starts a new one"
        )


@contextmanager
def lock(storage: Storage, what: str) -> Iterator[None]:
    """Keep other drivers out of a run or a table; freed when this process dies. Object stores have no locks."""
    if not storage.local:
        yield
        return
    import fcntl

    with _opened(storage.path / ".lock") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StorageError(f"{what} is in use by another process; wait for it or take another --name") from None
        yield


@contextmanager
def exclusive_access(storage: Storage) -> Iterator[None]:
    """Wait until no other process changes a folder as a whole; freed when this process dies. Object stores have no
    locks."""
    if not storage.local:
        yield
        return
    import fcntl

    # Next to the folder, which is replaced by a new one.
    with _opened(storage.path.with_name(f".{storage.path.name}.lock")) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _opened(path: Path) -> IO[str]:
    try:
        return path.open("a")
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}") from error


def refuse_foreign(storage: Storage, what: str) -> None:
    """Raise StorageError where a folder that ``what`` would begin in holds anything already."""
    if others := sorted(set(storage.names()) - {".lock"}):
        raise StorageError(
            f"{storage.uri} holds {others[0]!r}, which {what} has not written; take another --name, or an empty folder"
        )


def validate_name(name: str) -> str:
    """The name of a run or a table, if it may be one; raises StorageError."""
    if name == LATEST:
        raise StorageError(f"run name {LATEST!r} is not allowed: it is the link to the run that finished last")
    if not name or name.startswith(".") or not all(c.isalnum() or c in "-_.+" for c in name):
        raise StorageError(
            f"run name {name!r} is not allowed; use letters, digits and - _ . +, not beginning with a dot"
        )
    return name


def point_latest(run: Storage) -> None:
    """Have the link ``latest`` beside a finished run name it, by one rename; object stores have no links.

    Nothing happens where something else has that name, or where the file system has no links.
    """
    if not run.local:
        return
    link = run.path.with_name(LATEST)
    aside = link.with_name(f".{LATEST}.{uuid.uuid4().hex[:8]}.tmp")
    if link.exists() and not link.is_symlink():
        return
    try:
        aside.symlink_to(run.path.name)
        aside.replace(link)
    except OSError:
        aside.unlink(missing_ok=True)


def same_configuration(config: Config, stored: dict[str, Any], run: Storage, name: str) -> None:
    """Raise StorageError unless ``config`` may go on with a run that was started with the ``stored`` one."""
    with contextlib.suppress(ConfigError):  # settings that have come since the run was started have their default
        stored = validate(stored).model_dump(mode="json")
    given, kept = flatten_dict(config.model_dump(mode="json")), flatten_dict(stored)
    if given["train.epochs"] < kept.get("train.epochs", 0):
        trained = _trained(run, phases(config)[-1].name)
        if given["train.epochs"] < trained:
            raise StorageError(
                f"run {name!r} has trained {trained} epochs, train.epochs is {given['train.epochs']}; a run can end "
                "sooner than it was started for, but not before what it has trained"
            )
    if kept.get(MILESTONES) is not None and given.get(MILESTONES) is not None:
        # Milestones move along with the epochs, as the other schedules do.
        moved = scaled_milestones(kept[MILESTONES], kept["train.epochs"], given["train.epochs"])
        kept[MILESTONES] = moved if given[MILESTONES] == moved else kept[MILESTONES]
    for key in sorted(given.keys() | kept.keys()):
        if any(key == free or key.startswith(free + ".") for free in MUTABLE_ON_RESUME):
            continue
        if given.get(key) != kept.get(key):
            raise StorageError(
                f"run {name!r} was started with {key} = {kept.get(key)!r}, now it is {given.get(key)!r}; "
                "resume it with the same configuration or start a new run with another --name"
            )


def _trained(run: Storage, phase: str) -> int:
    """How many epochs of a phase a run has finished."""
    lines = run.read("metrics.jsonl").splitlines() if run.exists("metrics.jsonl") else []
    try:
        return max((row["epoch"] for row in map(json.loads, lines) if row["phase"] == phase), default=0)
    except (ValueError, TypeError, KeyError) as error:
        raise StorageError(f"{run.uri}: metrics.jsonl is damaged: {error}") from error


def read_checked(storage: Storage, file: str, *keys: str) -> dict[str, Any]:
    """Read a run's own YAML or JSON; raises StorageError if it is damaged or lacks a key."""
    load = load_json if file.endswith(".json") else load_yaml
    try:
        tree = load(storage.read(file))
    except DocumentError as error:
        raise StorageError(f"{storage.uri}/{file} is damaged: {error}") from error
    if not isinstance(tree, dict):
        raise StorageError(f"{storage.uri}/{file} is damaged: it holds no mapping")
    if lacking := [key for key in keys if key not in tree]:
        raise StorageError(f"{storage.uri}/{file} is damaged: it lacks {lacking[0]!r}")
    return tree


def _json(data: Any) -> bytes:
    return (json.dumps(data, indent=2) + "\n").encode()
