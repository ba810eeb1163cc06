"""Training of a protection with its classifier: the data, the task for the trainer, and the result."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raypp.config.schema import Config, OptimizationConfig
from raypp.data.base import stratified_split
from raypp.data.loader import Augmentation, BatchLoader, DeviceLoader, inference_batch_size, to_device, to_float_tensor
from raypp.data.splits import load_split, subsample
from raypp.models import ADAPTATIONS, CLASSIFIERS, FEATURES
from raypp.models.perceptual import StateDict, UnavailableWeightsError, VGG16Features, load_vgg_slice
from raypp.protections import PROTECTIONS
from raypp.protections.base import Protection
from raypp.training.checkpoint import EpochMetrics
from raypp.training.distributed import all_reduce_sum, run_on_all_ranks
from raypp.training.optim import autocast
from raypp.training.protected_classifier import (
    METRICS,
    ProtectedClassifier,
    build_protected_classifier,
    phases,
    uses_features,
)
from raypp.training.reporter import Reporter
from raypp.training.task import Phase, TrainableModule
from raypp.training.trainer import Trainer
from raypp.utils.errors import ConfigError
from raypp.utils.images import to_uint8
from raypp.utils.keys import Key
from raypp.utils.registry import MethodConfig


@dataclass(frozen=True)
class TrainingData:
    """Training and validation data of one worker; validation images are uint8 (N, H, W, C) on the device."""

    train: BatchLoader
    val: tuple[Tensor, Tensor]
    classes: tuple[str, ...]
    num_train: int
    fingerprint: str


@dataclass(frozen=True)
class TrainResult:
    """The networks with their lowest validation loss, and the metrics of all epochs."""

    system: ProtectedClassifier
    plain: StateDict | None
    data: TrainingData
    history: list[EpochMetrics]
    best: EpochMetrics


def prepare(config: Config) -> tuple[Config, StateDict | None, str | None]:
    """Choose the feature network before workers start; return the configuration, its weights, and a warning or None.

    Raises:
        ConfigError: its weights are invalid, or they are unavailable and ``features.fallback`` is "refuse".
    """
    features = config.features
    if not uses_features(config) or not isinstance(features, VGG16Features.Options):
        return config, None, None
    try:
        return config, load_vgg_slice(features.weights, features.layer), None
    except UnavailableWeightsError as error:
        if features.fallback == "refuse":
            raise ConfigError(
                f"VGG-16's ImageNet weights, which the paper's method needs, are not available: {error}; pass a file "
                "with --features.weights FILE, or accept a substitute, which departs from the paper, with "
                "--features.fallback allow"
            ) from error
    fallback = config.model_copy(update={"features": FEATURES.options("plain_classifier")(name="plain_classifier")})
    warning = (
        "torchvision's ImageNet VGG-16 weights are not available, so the feature network is the early block of a plain "
        "classifier: a departure from the paper, with distances of about a hundredth of VGG-16's, so train.alpha "
        f"{config.train.alpha:g} has the effect of {config.train.alpha / 100:g} with VGG-16, and features.layer has no "
        "effect; set features.weights to a file to avoid it"
    )
    return fallback, None, warning


def check_features(configs: Iterable[Config]) -> None:
    """Raise ConfigError if one of ``configs`` has no usable feature network; loads each network once."""
    checked: list[MethodConfig] = []
    for config in configs:
        if config.features not in checked and uses_features(config):
            prepare(config)
            checked.append(config.features)


def load_data(
    config: Config, device: torch.device, rank: int = 0, world: int = 1, key: Key | None = None
) -> TrainingData:
    """Read the training split into memory, hold out validation images and put both on the device as uint8."""
    if config.data.stream:
        raise ConfigError("data.stream is true, which needs Ray Train; remove --local, or set data.stream to false")
    full = load_split(config, "train")
    check_image_sizes(config, full.images.shape[1], full.images.shape[2])
    train_indices, val_indices = stratified_split(full.labels, config.data.num_val, config.seed)
    train = subsample(full.subset(train_indices), config.data.num_train, config.seed, "data.num_train")
    val = full.subset(val_indices)
    loader = DeviceLoader(
        *to_device(train.images, train.labels, device),
        batch_size=config.train.batch_size,
        seed=config.seed,
        augmentation=Augmentation(config.data.augment.crop_padding, config.data.augment.flip),
        rank=rank,
        world=world,
        first=build_pre_transform(config, key),
    )
    digest = hashlib.sha256((train.fingerprint() + val.fingerprint()).encode()).hexdigest()
    return TrainingData(loader, to_device(val.images, val.labels, device), full.classes, len(train), digest)


def check_image_sizes(config: Config, height: int, width: int) -> None:
    """Raise ConfigError if a network of the configuration cannot read images of this size."""
    for registry, name in ((CLASSIFIERS, config.classifier.name), (PROTECTIONS, config.protection.name)):
        min_side = registry.get(name).least_side
        if min(height, width) < min_side:
            raise ConfigError(
                f"{registry.kind} {name} needs sides of at least {min_side} pixels, the images are {height} x {width}; "
                "see data.image_size"
            )
    adaptation, default = config.adaptation_name, PROTECTIONS.get(config.protection.name).adaptation
    side, padded_to = (ADAPTATIONS.get(name).side if name in ADAPTATIONS else 1 for name in (adaptation, default))
    if padded_to % side and (height % side or width % side):
        raise ConfigError(
            f"adaptation {adaptation!r} needs sides in multiples of {side} pixels, the images are {height} x "
            f"{width}; see data.image_size"
        )


def build_pre_transform(config: Config, key: Key | None) -> Callable[[Tensor], Tensor] | None:
    """Build the protection of uint8 (N, H, W, C) that a loader applies before augmentation; None if it comes after."""
    if PROTECTIONS.get(config.protection.name).augment == "before":
        return None
    protection: Protection = PROTECTIONS.build(config.protection, channels=config.data.channels, key=key)

    def protect(images: Tensor) -> Tensor:
        return to_uint8(protection(images.permute(0, 3, 1, 2) / 255)).permute(0, 2, 3, 1)

    return protect


@torch.inference_mode()
def validate(
    system: ProtectedClassifier, images: Tensor, labels: Tensor, config: Config, rank: int, world: int
) -> dict[str, float]:
    """Average the loss and metrics over all workers' images, with protected images rounded to 8 bits.

    Args:
        images: uint8 (N, H, W, C); each worker takes every ``world``-th image, and may have none.
    """
    system.eval()
    context = autocast(config.train, images.device)
    names = ("loss", *METRICS)
    sums = torch.zeros(len(names) + 1, dtype=torch.float64, device=images.device)
    local_images, local_labels = images[rank::world], labels[rank::world]
    batch_size = inference_batch_size(images, config.train.eval_batch_size)
    for start in range(0, len(local_images), batch_size):
        part = slice(start, start + batch_size)
        batch, target = to_float_tensor(local_images[part]), local_labels[part]
        with context:
            output = system(batch, target, round_to_8bit=True)
        means = torch.stack((output.loss, *output.metrics.values(), torch.ones_like(output.loss)))
        sums += means.double() * len(target)
    *totals, num = all_reduce_sum(sums).tolist()
    return {f"val_{name}": total / num for name, total in zip(names, totals, strict=True)}


class ProtectionTask:
    """Trains a protection and its classifier in the phases of ``config.train.mode``."""

    train: OptimizationConfig
    divergence_hint = "train.optimizer.lr or train.alpha"

    def __init__(self, config: Config, data: TrainingData, phi: StateDict | None, key: Key | None) -> None:
        self.config, self.data, self.phi, self.key = config, data, phi, key
        self.seed, self.train, self.phases = config.seed, config.train, phases(config)
        self.batches, self.fingerprint = data.train, data.fingerprint
        self.plain: StateDict | None = None

    def build(self, phase: Phase) -> ProtectedClassifier:
        _, height, width, _ = self.data.val[0].shape
        size, num_classes = (height, width), len(self.data.classes)
        return build_protected_classifier(self.config, phase, num_classes, size, self.phi, self.plain, self.key)

    def validate(self, trainee: TrainableModule, rank: int, world: int) -> EpochMetrics:
        assert isinstance(trainee, ProtectedClassifier)
        return validate(trainee, *self.data.val, self.config, rank, world)

    def on_phase_end(self, phase: Phase, trainee: TrainableModule) -> None:
        assert isinstance(trainee, ProtectedClassifier)
        if phase.name == "plain":
            self.plain = {k: v.cpu() for k, v in trainee.classifier.state_dict().items()}

    def state_dict(self) -> dict[str, Any]:
        return {"plain": self.plain}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.plain = state["plain"]


def fit(
    config: Config,
    reporter: Reporter,
    phi: StateDict | None = None,
    key: Key | None = None,
    load: Callable[[], TrainingData] | None = None,
) -> TrainResult:
    """Train the networks of ``config``, from the newest intact checkpoint if there is one.

    Args:
        config, phi: from :func:`prepare`.
        load: loads this worker's training data; by default from ``config.data`` into memory.

    Raises:
        NonRetryableError: on every worker, if one of them cannot use the data or a checkpoint, or the loss is not
            finite.
        RayppError: storage fails, or a streamed image is damaged, on this worker.
    """

    def load_and_check() -> TrainingData:
        data = load() if load is not None else load_data(config, reporter.device, reporter.rank, reporter.world, key)
        problem = PROTECTIONS.get(config.protection.name).unfit(config.protection, len(data.classes))
        if problem is not None:
            raise ConfigError(problem)
        if reporter.rank == 0:  # a broken test split raises before training, not after it
            load_split(config, "test")
        return data

    data = run_on_all_ranks(load_and_check)
    task = ProtectionTask(config, data, phi, key)
    outcome = Trainer(task, reporter).train()
    assert isinstance(outcome.trainee, ProtectedClassifier)
    return TrainResult(outcome.trainee, task.plain, data, outcome.history, outcome.best)
