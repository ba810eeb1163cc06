"""Training a protection with its classifier: the data, the task that the loop trains, and what comes of it."""

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
from raypp.models.perceptual import StateDict, UnavailableWeightsError, VGG16FeatureOptions, load_vgg_slice
from raypp.protections import PROTECTIONS
from raypp.protections.base import Protection
from raypp.training.checkpoint import EpochMetrics
from raypp.training.distributed import all_reduce_sum
from raypp.training.optim import autocast, configure_torch
from raypp.training.protected_classifier import (
    METRICS,
    ProtectedClassifier,
    build_protected_classifier,
    phases,
    uses_features,
)
from raypp.training.reporter import Reporter
from raypp.training.task import Phase, TrainableModule
from raypp.training.trainer import Trainer, run_on_all_ranks
from raypp.utils.errors import ConfigError
from raypp.utils.images import to_uint8
from raypp.utils.keys import Key
from raypp.utils.registry import MethodConfig


@dataclass(frozen=True)
class TrainingData:
    """What one worker trains on and selects by; images are uint8 (N, H, W, C) on the device."""

    train: BatchLoader
    val: tuple[Tensor, Tensor]
    classes: tuple[str, ...]
    num_train: int
    fingerprint: str


@dataclass(frozen=True)
class TrainResult:
    """What training leaves behind: the networks at their lowest validation loss, and how they got there."""

    system: ProtectedClassifier
    plain: StateDict | None
    data: TrainingData
    history: list[EpochMetrics]
    best: EpochMetrics


def prepare(config: Config) -> tuple[Config, StateDict | None, str | None]:
    """Settle the feature network once, before workers start: configuration, its weights, and a warning or None.

    Raises:
        ConfigError: its weights cannot be used, or cannot be had and ``features.fallback`` is "refuse".
    """
    features = config.features
    if not uses_features(config) or not isinstance(features, VGG16FeatureOptions):
        return config, None, None
    try:
        return config, load_vgg_slice(features.weights, features.layer), None
    except UnavailableWeightsError as error:
        if features.fallback == "refuse":
            raise ConfigError(
                f"VGG-16's ImageNet weights, which the paper's method compares images with, cannot be had: {error}; "
                "give them as a file with --features.weights FILE, or take a stand-in, which is not the paper's "
                "method, with --features.fallback allow"
            ) from error
    fallback = config.model_copy(update={"features": FEATURES.options("plain_classifier")(name="plain_classifier")})
    return (
        fallback,
        None,
        (
            "torchvision's ImageNet VGG-16 weights cannot be had here, so the feature network is the early block of a "
            "plain classifier: a departure from the paper, whose distances are about a hundredth of VGG-16's: "
            f"train.alpha {config.train.alpha:g} weighs as {config.train.alpha / 100:g} would with VGG-16, and "
            "features.layer has no effect (give features.weights a file to avoid it)"
        ),
    )


def check_features(configs: Iterable[Config]) -> None:
    """Raise ConfigError where training one of ``configs`` would find no feature network; loads each network once."""
    checked: list[MethodConfig] = []
    for config in configs:
        if uses_features(config) and config.features not in checked:
            prepare(config)
            checked.append(config.features)


def load_data(
    config: Config, device: torch.device, rank: int = 0, world: int = 1, key: Key | None = None
) -> TrainingData:
    """Read the training split into memory, hold out validation images and put both on the device as uint8."""
    if config.data.stream:
        raise ConfigError("data.stream needs Ray Train; leave out --local, or set data.stream to false")
    full = load_split(config, "train")
    check_image_sizes(config, full.images.shape[1], full.images.shape[2])
    train_at, val_at = stratified_split(full.labels, config.data.num_val, config.seed)
    train = subsample(full.subset(train_at), config.data.num_train, config.seed, "data.num_train")
    val = full.subset(val_at)
    images, labels = to_device(train.images, train.labels, device)
    loader = DeviceLoader(
        images,
        labels,
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
    """Refuse images that a network of the configuration cannot read; raises ConfigError."""
    for kind, name, registry in (
        ("classifier", config.classifier.name, CLASSIFIERS),
        ("protection", config.protection.name, PROTECTIONS),
    ):
        least = registry.get(name).least_side
        if min(height, width) < least:
            raise ConfigError(
                f"{kind} {name} needs sides of at least {least} pixels, the images are {height} x {width}; "
                "see data.image_size"
            )
    adaptation, own = config.adaptation_name, PROTECTIONS.get(config.protection.name).adaptation
    side, padded_to = (ADAPTATIONS.get(name).side if name in ADAPTATIONS else 1 for name in (adaptation, own))
    if padded_to % side and (height % side or width % side):
        raise ConfigError(
            f"adaptation {adaptation!r} needs sides in multiples of {side} pixels, the images are {height} x "
            f"{width}; see data.image_size"
        )


def check_num_classes(config: Config, num_classes: int) -> None:
    """Refuse a protection that does not suit so many classes; raises ConfigError."""
    problem = PROTECTIONS.get(config.protection.name).unfit(config.protection, num_classes)
    if problem is not None:
        raise ConfigError(problem)


def build_pre_transform(config: Config, key: Key | None) -> Callable[[Tensor], Tensor] | None:
    """For a protection whose images are augmented after it: what a loader applies to uint8 (N, H, W, C), else None."""
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
    """Mean loss terms and accuracy on images after 8-bit rounding, over all workers' shares.

    Args:
        images: uint8 (N, H, W, C); each worker takes every ``world``-th image, which may be none.
    """
    system.eval()
    context = autocast(config.train, images.device)
    names = ("loss", *METRICS)
    sums = torch.zeros(len(names) + 1, dtype=torch.float64, device=images.device)
    mine_images, mine_labels = images[rank::world], labels[rank::world]
    num_together = inference_batch_size(images, config.train.eval_batch_size)
    for start in range(0, len(mine_images), num_together):
        chosen = slice(start, start + num_together)
        batch, target = to_float_tensor(mine_images[chosen]), mine_labels[chosen]
        with context():
            terms = system(batch, target, round_to_8bit=True)
        means = torch.stack((terms.loss, *(terms.metrics[name] for name in METRICS), torch.ones_like(terms.loss)))
        sums += means.double() * len(target)
    *found, num = all_reduce_sum(sums).tolist()
    return {f"val_{name}": value / num for name, value in zip(names, found, strict=True)}


class ProtectionTask:
    """A protection and its classifier, in the phases of ``config.train.mode``."""

    train: OptimizationConfig
    divergence_hint = "train.optimizer.lr or train.alpha"

    def __init__(self, config: Config, data: TrainingData, phi: StateDict | None, key: Key | None) -> None:
        self.config, self.data, self.phi, self.key = config, data, phi, key
        self.seed, self.train, self.phases = config.seed, config.train, phases(config)
        self.batches, self.fingerprint = data.train, data.fingerprint
        self.plain: StateDict | None = None

    def build(self, phase: Phase) -> ProtectedClassifier:
        height, width = self.data.val[0].shape[1:3]
        num_classes = len(self.data.classes)
        return build_protected_classifier(
            self.config, phase, num_classes, (height, width), self.phi, self.plain, self.key
        )

    def validate(self, trainee: TrainableModule, rank: int, world: int) -> EpochMetrics:
        assert isinstance(trainee, ProtectedClassifier)
        return validate(trainee, *self.data.val, self.config, rank, world)

    def end(self, phase: Phase, trainee: TrainableModule) -> None:
        assert isinstance(trainee, ProtectedClassifier)
        if phase.name == "plain":
            self.plain = {k: v.cpu() for k, v in trainee.classifier.state_dict().items()}

    def state(self) -> dict[str, Any]:
        return {"plain": self.plain}

    def restore(self, state: dict[str, Any]) -> None:
        self.plain = state["plain"]


def fit(
    config: Config,
    sink: Reporter,
    phi: StateDict | None = None,
    key: Key | None = None,
    load: Callable[[], TrainingData] | None = None,
) -> TrainResult:
    """Train what ``config`` describes, from the sink's newest sound checkpoint if it has one.

    Args:
        config: a configuration as ``prepare`` returned it.
        sink: where to report.
        phi: weights of the feature network, as ``prepare`` returned them.
        key: the key of a keyed protection.
        load: gives this worker's training data; by default it is read into memory from ``config.data``.

    Raises:
        StoppedError: on every worker alike: the data or a checkpoint cannot be used on one of them, or the loss is no
            longer a number.
        RayppError: storage fails, or a stream meets a damaged image, on this worker.
    """
    configure_torch(config.train)
    load = load or (lambda: load_data(config, sink.device, sink.rank, sink.world, key))
    data = run_on_all_ranks(load)
    run_on_all_ranks(lambda: check_num_classes(config, len(data.classes)))
    # Read once before hours are spent on what could not be measured in the end.
    run_on_all_ranks(lambda: load_split(config, "test") if sink.rank == 0 else None)
    task = ProtectionTask(config, data, phi, key)
    done = Trainer(task, sink).run()
    assert isinstance(done.trainee, ProtectedClassifier)
    return TrainResult(done.trainee, task.plain, data, done.history, done.best)
