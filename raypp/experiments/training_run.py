"""A run: one training under a storage path, from an empty folder to a bundle.

NAME/config.yaml          merged configuration
NAME/run.json             versions, hardware, what the feature network is, warnings
NAME/features.safetensors its weights, where it has some of its own
NAME/private/             the key of a keyed protection
NAME/metrics.jsonl        a line per epoch
NAME/checkpoints/         the newest two
NAME/summary.json         written last: test results; its presence says that the run is finished
NAME/bundle/              public/ and private/
NAME/protected.png        plain test images over protected ones
"""

from __future__ import annotations

import contextlib
import json
import platform
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

import raypp
from raypp import bundle
from raypp.bundle.guard import LEAST, Guard, calibrate
from raypp.config import Config, flatten, scaled_milestones, validate
from raypp.data.loader import images_at_a_time, to_device
from raypp.data.splits import load_split
from raypp.evaluation.evaluate import evaluate
from raypp.models.perceptual import StateDict
from raypp.protections import PROTECTIONS
from raypp.protections.base import Protection
from raypp.protections.plain import Plain, PlainOptions
from raypp.training.protected_classifier import System, build_system, phases, uses_features
from raypp.training.protection_task import Fit, fit, prepare
from raypp.training.reporter import LocalSink, metrics_lines, newest_first
from raypp.utils import images, keys, runtime
from raypp.utils.documents import DocumentError, load_json, load_yaml
from raypp.utils.errors import ConfigError, StorageError
from raypp.utils.keys import Key
from raypp.utils.progress import Shows
from raypp.utils.storage import Storage

# What may differ when a run is resumed: how long, and on what; everything else would make it another run.
RESUMABLE = (
    "train.epochs",
    "train.eval_batch_size",
    "train.checkpoint_seconds",
    "train.adapt_threads",
    "data.num_test",
    "features.fallback",  # settled when the run began
    "cluster",
)
MILESTONES = "train.schedule.milestones"
NUM_PICTURED = 10
NUM_GUARDED, NUM_SAMPLE = 10_000, 32  # images for the guard and for the sample
GUARDED_BYTES = 2**28  # of images for the guard, of each kind
# Files that a run has before its configuration is written.
OURS = {".lock", "run.json", "features.safetensors", "private"}
KEY = f"private/{keys.FILE}"
LATEST = "latest"  # the link beside runs that names the one that finished last


@dataclass(frozen=True)
class Run:
    """An opened run; ``config`` and ``phi`` are settled by :func:`~raypp.training.protection_task.prepare`."""

    storage: Storage
    config: Config
    phi: StateDict | None
    key: Key | None
    warnings: tuple[str, ...]


@contextmanager
def open_run(config: Config, name: str, *, resume: bool = False) -> Iterator[Run]:
    """Create the folder of a new run, or with ``resume`` open an old one; hold its lock meanwhile.

    Raises:
        StorageError: the name is taken, in use, unknown (with ``resume``), or its configuration is another one.
    """
    storage = Storage(config.cluster.storage).folder(checked_name(name))
    if resume and not storage.exists("config.yaml"):
        raise StorageError(f"there is no run {name!r} to resume under {config.cluster.storage!r}")
    if not resume:
        settled, phi, warning = prepare(config)  # before the folder: a mistake found here leaves no trace
        key = new_key(config)
        storage.create()
    with lock(storage, f"run {name!r}"):
        if resume:
            before = stored(storage, "config.yaml", "train", "data")
            same_configuration(config, before, storage, name)
            run = _reopen(storage, config)
            other = config.train.epochs != before["train"]["epochs"]
            if other and config.train.plain_epochs is None and len(phases(run.config)) > 1:
                raise StorageError(
                    f"run {name!r} has no train.plain_epochs, so train.epochs is the length of its plain phase too and "
                    "cannot change; give train.plain_epochs when you start a run whose length may change"
                )
            storage.write("config.yaml", config.to_yaml().encode())
            yield run
        else:
            _refuse_taken(storage, name)
            warnings = (warning,) if warning else ()
            storage.remove("features.safetensors")
            storage.remove(KEY)
            if key is not None:
                storage.write(KEY, key.text().encode(), secret=True)
                if storage.local:
                    (storage.path / KEY).parent.chmod(0o700)
            if phi is not None:
                from safetensors.torch import save

                storage.write("features.safetensors", save(phi))
            about = {
                "features": settled.features.model_dump(mode="json"),
                "key": key.identifier if key is not None else None,
                "warnings": list(warnings),
                "environment": environment(),
            }
            storage.write("run.json", _json(about))
            storage.write("config.yaml", config.to_yaml().encode())
            yield Run(storage, settled, phi, key, warnings)


def summary(run: Run) -> dict[str, Any] | None:
    """The results of a finished run, or None while it has to go on (another number of epochs included)."""
    if not run.storage.exists("summary.json"):
        return None
    found = stored(run.storage, "summary.json", "epochs", "test", "seconds", "classes", "warnings")
    return found if found["epochs"] == {p.name: p.epochs for p in phases(run.config)} else None


def train_locally(run: Run, display: Shows, device: torch.device | None = None) -> dict[str, Any]:
    """Train in this process, without Ray.

    Raises:
        ToldToStop: by ``display``, after a checkpoint.
    """
    sink = LocalSink(run.storage, display, device)
    result = fit(run.config, sink, run.phi, run.key)
    return conclude(run, result, sink.device) if sink.rank == 0 else {}


def conclude(run: Run, result: Fit, device: torch.device) -> dict[str, Any]:
    """Measure on the test split, export the bundle and a picture, and return (and store) the summary."""
    config, system = run.config, result.system
    test = load_split(config, "test")
    test_images, test_labels = to_device(test.images, test.labels, device)
    image_size = (test.images.shape[1], test.images.shape[2])
    batch = config.train.eval_batch_size
    numbers = evaluate(system.protection, system.classifier, test_images, test_labels, batch)
    plain_numbers = None
    if result.plain is not None and len(phases(config)) > 1:  # else it is the classifier measured above
        phase = phases(config)[0]
        plain = build_system(config, phase, len(test.classes), image_size).classifier.to(device)
        plain.load_state_dict(result.plain)
        plain_numbers = evaluate(Plain(PlainOptions()), plain, test_images, test_labels, batch)
    found = {
        "test": numbers,
        "plain_test": plain_numbers,
        "best": result.best,
        "epochs": {p.name: p.epochs for p in phases(config)},
        "seconds": sum(row["seconds"] for row in result.history),
        "classes": list(result.data.classes),
        "image_size": list(image_size),
        "num_train": result.data.num_train,
        "num_val": len(result.data.val[1]),
        "data_fingerprint": result.data.fingerprint,
        "test_fingerprint": test.fingerprint(),
        "features": _describe_features(config),
        "warnings": list(run.warnings),
    }
    shown = first_of_each_class(test.labels, NUM_PICTURED)
    # A plain image beside its protected one gives a key away: the picture has a key of its own, which is forgotten.
    pictured = build_protection(config, Key.generate()).to(device) if run.key is not None else system.protection
    protected = pictured.protect(test_images[torch.from_numpy(shown).to(device)].permute(0, 3, 1, 2))
    rows = [test.images[shown], protected.permute(0, 2, 3, 1).cpu().numpy()]
    label = "protected" if run.key is None else "protected (another key)"
    picture = images.grid(rows, labels=["plain", label])
    run.storage.write("protected.png", images.encode_png(picture))
    guard, sample = _for_serving(system, result.data.val[0], test_images)
    bundle.export(
        run.storage,
        "bundle",
        config=config,
        protection=system.protection.state_dict(),
        classifier=system.classifier.state_dict(),
        plain_classifier=result.plain,
        classes=result.data.classes,
        image_size=image_size,
        key=run.key,
        guard=guard,
        sample=sample,
        metrics=found,
        environment=environment(),
    )
    run.storage.write("metrics.jsonl", metrics_lines(result.history))
    run.storage.write("summary.json", _json(found))
    return found


@torch.inference_mode()
def _for_serving(system: System, val: Tensor, test: Tensor) -> tuple[Guard | None, tuple[Tensor, Tensor]]:
    """What a service needs besides: a guard against plain images, and a sample by which it checks itself.

    Args:
        val, test: plain images uint8 (N, H, W, C).
    """
    num = min(NUM_GUARDED, max(2 * LEAST, GUARDED_BYTES // val[0].numel()))
    plain = [images[:num].permute(0, 3, 1, 2) for images in (val, test)]
    together = images_at_a_time(val)
    protected = [torch.cat([system.protection.protect(part) for part in p.split(together)]) for p in plain]
    guard = None
    if system.protection.hides:
        guard = calibrate(plain[0], protected[0], plain[1], protected[1])
    sample = protected[1][:NUM_SAMPLE]
    return guard, (sample.cpu(), system.classifier(sample.float() / 255).argmax(1).cpu())


def build_protection(config: Config, key: Key | None) -> Protection:
    """The configured protection, untrained."""
    built: Protection = PROTECTIONS.build(config.protection, channels=config.data.channels, key=key)
    return built


def new_key(config: Config) -> Key | None:
    """The key that a new run of a keyed protection begins with: from its key file, or newly made."""
    if not PROTECTIONS.get(config.protection.name).needs_key(config.protection):
        return None
    named: str | None = getattr(config.protection, "key_file", None)
    return Key.read(named) if named else Key.generate()


def stored_key(storage: Storage) -> Key | None:
    """The key of a run, or None where its protection has none."""
    if not storage.exists(KEY):
        return None
    return Key.parse(storage.read(KEY).decode("ascii", "replace"), f"{storage.uri}/{KEY}")


def first_of_each_class(labels: np.ndarray, num: int) -> np.ndarray:
    """Indices of ``num`` images that take turns through the classes, in order of appearance."""
    turn = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        at = np.flatnonzero(labels == label)
        turn[at] = np.arange(len(at))
    return np.lexsort((labels, turn))[:num]


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


def _describe_features(config: Config) -> str:
    if not uses_features(config):
        return "none"
    options = config.features.model_dump(mode="json")
    name, layer = options.pop("name"), options.pop("layer", "early block")
    options.pop("fallback", None)  # what was taken in the end is named
    told = ", ".join(f"{key} {value}" for key, value in options.items())
    return f"{name}, {layer}" + (f" ({told})" if told else "")


def _refuse_taken(storage: Storage, name: str) -> None:
    """Refuse a folder that holds work, or anything that is not a run's; one that stopped before its first checkpoint
    is free. Whoever asks holds the lock, so of two runs that start at once the second finds it taken or in use."""
    begun = storage.exists("config.yaml") and (storage.exists("summary.json") or newest_first(storage))
    # A run has run.json before anything else that bears a common name.
    ours = storage.exists("run.json")
    foreign = storage.local and not ours and {p.name for p in storage.path.iterdir()} - (OURS - {"run.json"})
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
def one_at_a_time(storage: Storage) -> Iterator[None]:
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


def checked_name(name: str) -> str:
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
    given, kept = flatten(config.model_dump(mode="json")), flatten(stored)
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
        if any(key == free or key.startswith(free + ".") for free in RESUMABLE):
            continue
        if given.get(key) != kept.get(key):
            raise StorageError(
                f"run {name!r} was started with {key} = {kept.get(key)!r}, now it is {given.get(key)!r}; "
                "resume it with the same configuration or start a new run with another --name"
            )


def _reopen(storage: Storage, config: Config) -> Run:
    from safetensors import SafetensorError
    from safetensors.torch import load

    from raypp.models import FEATURES

    about = stored(storage, "run.json", "features", "warnings")
    try:
        features = FEATURES.options(about["features"]["name"]).model_validate(about["features"])
        phi = load(storage.read("features.safetensors")) if storage.exists("features.safetensors") else None
    except (ConfigError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise StorageError(f"{storage.uri}: run.json or features.safetensors is damaged: {error}") from error
    settled = config.model_copy(update={"features": features})
    key = stored_key(storage)
    if (key.identifier if key is not None else None) != about.get("key"):
        raise StorageError(
            f"{storage.uri}/{KEY} is missing or not the key {about.get('key')} that the run was started with; put the "
            "run's own key file back"
        )
    return Run(storage, settled, phi, key, tuple(about["warnings"]))


def _trained(run: Storage, phase: str) -> int:
    """How many epochs of a phase a run has finished."""
    lines = run.read("metrics.jsonl").splitlines() if run.exists("metrics.jsonl") else []
    try:
        return max((row["epoch"] for row in map(json.loads, lines) if row["phase"] == phase), default=0)
    except (ValueError, TypeError, KeyError) as error:
        raise StorageError(f"{run.uri}: metrics.jsonl is damaged: {error}") from error


def stored(storage: Storage, file: str, *keys: str) -> dict[str, Any]:
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
