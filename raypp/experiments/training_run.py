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

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raypp.bundle.export import export
from raypp.bundle.guard import LEAST, PlainImageDetector, calibrate_detector
from raypp.config.schema import Config
from raypp.data.loader import inference_batch_size, to_device
from raypp.data.splits import load_split
from raypp.evaluation.evaluate import evaluate
from raypp.experiments.run_folder import (
    _json,
    describe_feature_network,
    ensure_free,
    environment,
    lock,
    read_checked,
    same_configuration,
    validate_name,
)
from raypp.models.perceptual import StateDict
from raypp.protections import PROTECTIONS
from raypp.protections.base import Protection
from raypp.protections.plain import Plain, PlainOptions
from raypp.training.checkpoint import to_json_lines
from raypp.training.protected_classifier import ProtectedClassifier, build_protected_classifier, phases
from raypp.training.protection_task import TrainResult, fit, prepare
from raypp.training.reporter import LocalReporter
from raypp.utils import images, keys
from raypp.utils.errors import ConfigError, StorageError
from raypp.utils.keys import Key
from raypp.utils.progress import ProgressListener
from raypp.utils.storage import Storage

NUM_PICTURED = 10
NUM_GUARDED, NUM_SAMPLE = 10_000, 32  # images for the guard and for the sample
GUARDED_BYTES = 2**28  # of images for the guard, of each kind
KEY = f"private/{keys.FILE}"


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
    storage = Storage(config.cluster.storage).folder(validate_name(name))
    if resume and not storage.exists("config.yaml"):
        raise StorageError(f"there is no run {name!r} to resume under {config.cluster.storage!r}")
    if not resume:
        settled, phi, warning = prepare(config)  # before the folder: a mistake found here leaves no trace
        key = new_key(config)
        storage.create()
    with lock(storage, f"run {name!r}"):
        if resume:
            before = read_checked(storage, "config.yaml", "train", "data")
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
            ensure_free(storage, name)
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
    found = read_checked(run.storage, "summary.json", "epochs", "test", "seconds", "classes", "warnings")
    return found if found["epochs"] == {p.name: p.epochs for p in phases(run.config)} else None


def train_locally(run: Run, display: ProgressListener, device: torch.device | None = None) -> dict[str, Any]:
    """Train in this process, without Ray.

    Raises:
        ToldToStop: by ``display``, after a checkpoint.
    """
    sink = LocalReporter(run.storage, display, device)
    result = fit(run.config, sink, run.phi, run.key)
    return finalize_run(run, result, sink.device) if sink.rank == 0 else {}


def finalize_run(run: Run, result: TrainResult, device: torch.device) -> dict[str, Any]:
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
        plain = build_protected_classifier(config, phase, len(test.classes), image_size).classifier.to(device)
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
        "features": describe_feature_network(config),
        "warnings": list(run.warnings),
    }
    shown = first_of_each_class(test.labels, NUM_PICTURED)
    # A plain image beside its protected one gives a key away: the picture has a key of its own, which is forgotten.
    pictured = build_protection(config, Key.generate()).to(device) if run.key is not None else system.protection
    protected = pictured.protect(test_images[torch.from_numpy(shown).to(device)].permute(0, 3, 1, 2))
    rows = [test.images[shown], protected.permute(0, 2, 3, 1).cpu().numpy()]
    label = "protected" if run.key is None else "protected (another key)"
    picture = images.make_grid(rows, labels=["plain", label])
    run.storage.write("protected.png", images.encode_png(picture))
    guard, sample = _build_serving_data(system, result.data.val[0], test_images)
    export(
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
    run.storage.write("metrics.jsonl", to_json_lines(result.history))
    run.storage.write("summary.json", _json(found))
    return found


@torch.inference_mode()
def _build_serving_data(
    system: ProtectedClassifier, val: Tensor, test: Tensor
) -> tuple[PlainImageDetector | None, tuple[Tensor, Tensor]]:
    """What a service needs besides: a guard against plain images, and a sample by which it checks itself.

    Args:
        val, test: plain images uint8 (N, H, W, C).
    """
    num = min(NUM_GUARDED, max(2 * LEAST, GUARDED_BYTES // val[0].numel()))
    plain = [images[:num].permute(0, 3, 1, 2) for images in (val, test)]
    together = inference_batch_size(val)
    protected = [torch.cat([system.protection.protect(part) for part in p.split(together)]) for p in plain]
    guard = None
    if system.protection.hides:
        guard = calibrate_detector(plain[0], protected[0], plain[1], protected[1])
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


def _reopen(storage: Storage, config: Config) -> Run:
    from safetensors import SafetensorError
    from safetensors.torch import load

    from raypp.models import FEATURES

    about = read_checked(storage, "run.json", "features", "warnings")
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
