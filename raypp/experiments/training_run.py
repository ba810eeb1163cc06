"""A run: one training under a storage path, from an empty folder to a bundle.

NAME/config.yaml          merged configuration
NAME/run.json             versions, hardware, feature network, warnings
NAME/features.safetensors weights of the feature network, if it does not take them from the plain classifier
NAME/private/             the key of a keyed protection
NAME/metrics.jsonl        a line per epoch
NAME/checkpoints/         the newest two; on Ray Train also that of the best epoch
NAME/validation/          validation images of a stream
NAME/bundle/              public/ and private/
NAME/protected.png        plain test images above protected ones
NAME/summary.json         written last: test results; a run with this file is finished
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
from raypp.evaluation.client_cost import client_of_run
from raypp.evaluation.evaluate import evaluate
from raypp.experiments import run_folder
from raypp.experiments.run_folder import environment, lock, read_checked
from raypp.metrics.image import use_backend
from raypp.models.perceptual import StateDict
from raypp.protections import PROTECTIONS
from raypp.protections.base import Protection
from raypp.protections.plain import Plain
from raypp.training.checkpoint import to_json_lines
from raypp.training.protected_classifier import ProtectedClassifier, build_protected_classifier, phases
from raypp.training.protection_task import TrainResult, fit, prepare
from raypp.training.reporter import Reporter
from raypp.utils import images, keys
from raypp.utils.device import default_device
from raypp.utils.documents import dump_json
from raypp.utils.errors import ConfigError, StorageError
from raypp.utils.keys import Key
from raypp.utils.progress import ProgressListener
from raypp.utils.storage import Storage

NUM_PICTURED = 10
NUM_GUARDED, NUM_SAMPLE = 10_000, 32  # images for the detector of plain images, and for the self-test sample
GUARDED_BYTES = 2**28  # of images for the detector, per split
KEY = f"private/{keys.FILE}"


@dataclass(frozen=True)
class Run:
    """An opened run; :func:`~raypp.training.protection_task.prepare` resolves ``config`` and ``phi``.

    Attributes:
        phi: weights of the feature network, if it does not take them from the plain classifier.
    """

    storage: Storage
    config: Config
    phi: StateDict | None
    key: Key | None
    warnings: tuple[str, ...]


@contextmanager
def open_run(config: Config, name: str, *, resume: bool = False) -> Iterator[Run]:
    """Create the folder of a new run, or open an existing one with ``resume``; hold its lock meanwhile.

    Raises:
        StorageError: the name exists already, is in use or, with ``resume``, does not exist or has other settings.
    """
    storage = Storage(config.cluster.storage).folder(run_folder.validate_name(name))
    if resume:
        if not storage.exists("config.yaml"):
            raise StorageError(f"there is no run {name!r} to resume under {config.cluster.storage!r}")
        with lock(storage, f"run {name!r}"):
            yield _resume(storage, config, name)
    else:
        resolved, phi, warning = prepare(config)  # before the folder: an invalid configuration creates none
        run = Run(storage, resolved, phi, new_key(config), (warning,) if warning else ())
        storage.create()
        with lock(storage, f"run {name!r}"):
            run_folder.ensure_free(storage, name)
            _write_new_run(run, config)
            yield run


def _write_new_run(run: Run, config: Config) -> None:
    """Write the files of a new run; ``config`` is the unresolved configuration."""
    from safetensors.torch import save

    storage, key = run.storage, run.key
    storage.remove("features.safetensors")
    storage.remove(KEY)
    if key is not None:
        storage.write(KEY, key.text().encode(), secret=True)
        if storage.local:
            (storage.path / KEY).parent.chmod(0o700)
    if run.phi is not None:
        storage.write("features.safetensors", save(run.phi))
    info = {
        "features": run.config.features.model_dump(mode="json"),
        "key": key.identifier if key is not None else None,
        "warnings": list(run.warnings),
        "environment": environment(),
    }
    storage.write("run.json", dump_json(info))
    storage.write("config.yaml", config.to_yaml().encode())


def _resume(storage: Storage, config: Config, name: str) -> Run:
    """Read a stored run and replace its configuration."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    from raypp.models import FEATURES

    stored = read_checked(storage, "config.yaml", "train", "data")
    run_folder.check_resumable(config, stored, storage, name)
    info = read_checked(storage, "run.json", "features", "warnings")
    try:
        features = FEATURES.options(info["features"]["name"]).model_validate(info["features"])
        phi = load(storage.read("features.safetensors")) if storage.exists("features.safetensors") else None
    except (ConfigError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise StorageError(f"{storage.uri}: run.json or features.safetensors is damaged: {error}") from error
    key = stored_key(storage)
    if (key.identifier if key is not None else None) != info.get("key"):
        raise StorageError(
            f"{storage.uri}/{KEY} is missing or not the key {info.get('key')} that the run was started with; put the "
            "run's own key file back"
        )
    run = Run(storage, config.model_copy(update={"features": features}), phi, key, tuple(info["warnings"]))
    changes_length = config.train.epochs != stored["train"]["epochs"]
    if changes_length and config.train.plain_epochs is None and len(phases(run.config)) > 1:
        raise StorageError(
            f"run {name!r} has no train.plain_epochs, so train.epochs is the length of its plain phase too and "
            "cannot change; give train.plain_epochs when you start a run whose length may change"
        )
    storage.write("config.yaml", config.to_yaml().encode())
    return run


def summary(run: Run) -> dict[str, Any] | None:
    """The results of a finished run; None if it has not finished, or has another number of epochs."""
    if not run.storage.exists("summary.json"):
        return None
    results = read_checked(run.storage, "summary.json", "epochs", "test", "seconds", "classes", "warnings")
    return results if results["epochs"] == {p.name: p.epochs for p in phases(run.config)} else None


def train_locally(run: Run, display: ProgressListener, device: torch.device | None = None) -> dict[str, Any]:
    """Train in this process, without Ray; returns the summary.

    Raises:
        TrainingInterrupted: ``display`` requested a stop, and a checkpoint is saved.
    """
    reporter = Reporter(run.storage, display, device or default_device(run.config.cluster.gpu))
    result = fit(run.config, reporter, run.phi, run.key)
    return finalize_run(run, result, reporter.device) if reporter.rank == 0 else {}


def finalize_run(run: Run, result: TrainResult, device: torch.device) -> dict[str, Any]:
    """Evaluate on the test split, export the bundle and a picture, and store and return the summary."""
    with use_backend(run.config.metrics.backend):
        return _finalize_run(run, result, device)


def _finalize_run(run: Run, result: TrainResult, device: torch.device) -> dict[str, Any]:
    config, system = run.config, result.system
    test = load_split(config, "test")
    test_images, test_labels = to_device(test.images, test.labels, device)
    batch_size = config.train.eval_batch_size
    test_results = evaluate(system.protection, system.classifier, test_images, test_labels, batch_size)
    plain_results = _evaluate_plain(config, result, test_images, test_labels)
    shape = (config.data.channels, test.images.shape[1], test.images.shape[2])
    results = {
        "test": test_results,
        "plain_test": plain_results,
        "client": client_of_run(config, system.protection, shape, test_results, plain_results, len(test.classes)),
        "best": result.best,
        "epochs": {p.name: p.epochs for p in phases(config)},
        "seconds": sum(row["seconds"] for row in result.history),
        "classes": list(result.data.classes),
        "image_size": list(test.images.shape[1:3]),
        "num_train": result.data.num_train,
        "num_val": len(result.data.val[1]),
        "data_fingerprint": result.data.fingerprint,
        "test_fingerprint": test.fingerprint(),
        "features": run_folder.describe_feature_network(config),
        "warnings": list(run.warnings),
    }
    run.storage.write("protected.png", _picture(run, system, test_images, test.labels))
    guard, sample = _build_serving_data(system, result.data.val[0], test_images)
    export(
        run.storage,
        "bundle",
        config=config,
        protection=system.protection.state_dict(),
        classifier=system.classifier.state_dict(),
        plain_classifier=result.plain,
        classes=result.data.classes,
        image_size=(test.images.shape[1], test.images.shape[2]),
        key=run.key,
        guard=guard,
        sample=sample,
        metrics=results,
        environment=environment(),
    )
    run.storage.write("metrics.jsonl", to_json_lines(result.history))
    run.storage.write("summary.json", dump_json(results))
    return results


def _evaluate_plain(config: Config, result: TrainResult, images: Tensor, labels: Tensor) -> dict[str, Any] | None:
    """Test results of the plain classifier; None if the run has none besides its main classifier.

    Args:
        images: plain test images uint8 (N, H, W, C).
    """
    if result.plain is None or len(phases(config)) == 1:
        return None
    num_classes, image_size = len(result.data.classes), (images.shape[1], images.shape[2])
    plain = build_protected_classifier(config, phases(config)[0], num_classes, image_size).classifier.to(images.device)
    plain.load_state_dict(result.plain)
    return evaluate(Plain(Plain.Options()), plain, images, labels, config.train.eval_batch_size)


def _picture(run: Run, system: ProtectedClassifier, test_images: Tensor, test_labels: np.ndarray) -> bytes:
    """Plain test images above protected ones, as a PNG."""
    plain = test_images[torch.from_numpy(first_of_each_class(test_labels, NUM_PICTURED)).to(test_images.device)]
    protection: Protection = system.protection
    label = "protected"
    if run.key is not None:  # plain and protected pixels together reveal a key, so the picture uses another one
        options, channels = run.config.protection, run.config.data.channels
        protection = PROTECTIONS.build(options, channels=channels, key=Key.generate()).to(plain.device)
        label = "protected (another key)"
    protected = protection.protect(plain.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    rows = [plain.cpu().numpy(), protected.cpu().numpy()]
    return images.encode_png(images.make_grid(rows, labels=["plain", label]))


@torch.inference_mode()
def _build_serving_data(
    system: ProtectedClassifier, val: Tensor, test: Tensor
) -> tuple[PlainImageDetector | None, tuple[Tensor, Tensor]]:
    """A detector of plain images, and a sample (protected images, predicted classes) for a service's self-test.

    Args:
        val, test: plain images uint8 (N, H, W, C).
    """
    num = min(NUM_GUARDED, max(2 * LEAST, GUARDED_BYTES // val[0].numel()))
    plain = [split[:num].permute(0, 3, 1, 2) for split in (val, test)]
    batch_size = inference_batch_size(val)
    protected = [torch.cat([system.protection.protect(batch) for batch in p.split(batch_size)]) for p in plain]
    hides = system.protection.hides
    guard = calibrate_detector(plain[0], protected[0], plain[1], protected[1]) if hides else None
    sample = protected[1][:NUM_SAMPLE]
    return guard, (sample.cpu(), system.classifier(sample.float() / 255).argmax(1).cpu())


def new_key(config: Config) -> Key | None:
    """The key of a new run: from the protection's key file, or generated; None if the protection has no key."""
    if not PROTECTIONS.get(config.protection.name).needs_key(config.protection):
        return None
    path: str | None = getattr(config.protection, "key_file", None)
    return Key.read(path) if path else Key.generate()


def stored_key(storage: Storage) -> Key | None:
    """The key of a stored run; None if its protection has no key."""
    if not storage.exists(KEY):
        return None
    return Key.parse(storage.read(KEY).decode("ascii", "replace"), f"{storage.uri}/{KEY}")


def first_of_each_class(labels: np.ndarray, num: int) -> np.ndarray:
    """Indices of ``num`` images that cycle through the classes, in order of appearance."""
    occurrence = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        indices = np.flatnonzero(labels == label)
        occurrence[indices] = np.arange(len(indices))
    return np.lexsort((labels, occurrence))[:num]
