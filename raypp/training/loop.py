"""The one training loop: joint, frozen-classifier and plain training, on one worker or many, with or without Ray."""

from __future__ import annotations

import hashlib
import math
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from raypp.config import Config, Constant, MultiStep, Optimizer, Train
from raypp.data import SOURCES
from raypp.data.base import ImageSet, stratified_split
from raypp.data.loader import Augmentation, Batches, DeviceLoader, as_input, generator, to_device
from raypp.errors import ConfigError, DataError, RayppError, StoppedError, TrainingError
from raypp.images import to_uint8
from raypp.keys import Key
from raypp.nets import CLASSIFIERS, FEATURES
from raypp.nets.features import StateDict, VGG16FeatureOptions, load_vgg_slice
from raypp.protections import PROTECTIONS
from raypp.protections.base import Protection
from raypp.training import checkpoint
from raypp.training.distributed import (
    average_batch_statistics,
    distributed,
    first_error,
    synchronise_batch_norms,
    total,
)
from raypp.training.sinks import Row, Sink
from raypp.training.system import Phase, System, Terms, build_system, phases, uses_features

PROGRESS_SECONDS = 0.25
CHECK_STEPS = 50  # how often the loss is looked at: reading it waits for the device


@dataclass(frozen=True)
class TrainingData:
    """What one worker trains on and selects by; images are uint8 (N, H, W, C) on the device."""

    train: Batches
    val: tuple[Tensor, Tensor]
    classes: tuple[str, ...]
    num_train: int
    fingerprint: str


@dataclass(frozen=True)
class Fit:
    """What training leaves behind: the networks at their lowest validation loss, and how they got there."""

    system: System
    plain: StateDict | None
    data: TrainingData
    history: list[Row]
    best: Row


def prepare(config: Config) -> tuple[Config, StateDict | None, str | None]:
    """Settle the feature network once, before workers start: configuration, its weights, and a warning or None.

    Raises:
        ConfigError: weights were named and cannot be used.
    """
    if not uses_features(config) or not isinstance(config.features, VGG16FeatureOptions):
        return config, None, None
    state = load_vgg_slice(config.features.weights)
    if state is not None:
        return config, state, None
    fallback = config.model_copy(update={"features": FEATURES.options("plain_classifier")(name="plain_classifier")})
    return (
        fallback,
        None,
        (
            "torchvision's ImageNet VGG-16 weights cannot be had here, so the feature network is the early block of a "
            "plain classifier: a departure from the paper, whose distances are about a hundredth of VGG-16's, so "
            "train.alpha must be that much larger (give features.weights a file to avoid it)"
        ),
    )


def load_data(
    config: Config, device: torch.device, rank: int = 0, world: int = 1, key: Key | None = None
) -> TrainingData:
    """Read the training split into memory, hold out validation images and put both on the device as uint8."""
    if config.data.stream:
        raise ConfigError("data.stream needs Ray Train; leave out --local, or set data.stream to false")
    full = load_split(config, "train")
    height, width = full.images.shape[1:3]
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
    train_at, val_at = stratified_split(full.labels, config.data.num_val, config.seed)
    train = limit(full.subset(train_at), config.data.num_train, config.seed, "data.num_train")
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
        first=protect_first(config, key),
    )
    digest = hashlib.sha256((train.fingerprint() + val.fingerprint()).encode()).hexdigest()
    return TrainingData(loader, to_device(val.images, val.labels, device), full.classes, len(train), digest)


def protect_first(config: Config, key: Key | None) -> Callable[[Tensor], Tensor] | None:
    """For a protection whose images are augmented after it: what a loader applies to uint8 (N, H, W, C), else None."""
    if PROTECTIONS.get(config.protection.name).augment == "before":
        return None
    protection: Protection = PROTECTIONS.build(config.protection, channels=config.data.channels, key=key)

    def protect(images: Tensor) -> Tensor:
        return to_uint8(protection(images.permute(0, 3, 1, 2) / 255)).permute(0, 2, 3, 1)

    return protect


def load_split(config: Config, split: str) -> ImageSet:
    """Read one split of the configured source, fitted to ``data.image_size``."""
    data = config.data
    images: ImageSet = SOURCES.build(data.source, size=data.image_size, channels=data.channels).load(split)
    return limit(images, data.num_test, config.seed, "data.num_test") if split == "test" else images


def limit(images: ImageSet, num: int | None, seed: int, field: str) -> ImageSet:
    """A stratified subset of ``num`` images, or all of them."""
    if num is None or num == len(images):
        return images
    if num > len(images):
        raise DataError(f"{field} is {num}, but there are only {len(images)} images")
    return images.subset(stratified_split(images.labels, num, seed)[1])


def learning_rate(train: Train, epochs: int, progress: float) -> float:
    """The learning rate after ``progress`` epochs (a fraction within an epoch counts) of ``epochs``."""
    schedule, peak = train.schedule, train.optimizer.lr
    if isinstance(schedule, Constant):
        return peak
    if isinstance(schedule, MultiStep):
        return peak * schedule.gamma ** sum(progress >= m for m in schedule.milestones)
    done = min(progress / epochs, 1.0)
    if done < schedule.warmup:
        return peak * done / schedule.warmup
    return peak * (schedule.final + (1 - schedule.final) * (1 - done) / (1 - schedule.warmup))


def build_optimizer(options: Optimizer, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if options.name == "sgd":
        return torch.optim.SGD(parameters, lr=options.lr, momentum=options.momentum, weight_decay=options.weight_decay)
    return torch.optim.AdamW(
        parameters, lr=options.lr, betas=(options.momentum, 0.999), weight_decay=options.weight_decay
    )


def autocast(config: Config, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """A context for the forward pass: bf16 where the hardware computes in it, else float32."""
    wanted = config.train.precision
    able = bf16_is_fast(device)
    enabled = wanted == "bf16" or (wanted == "auto" and able)
    return lambda: torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def bf16_is_fast(device: torch.device) -> bool:
    """Whether convolutions gain from bf16: GPUs from Ampere on, CPUs with AVX-512 BF16 or AMX."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@torch.inference_mode()
def validate(system: System, images: Tensor, labels: Tensor, config: Config, rank: int, world: int) -> dict[str, float]:
    """Mean loss terms and accuracy on images after 8-bit rounding, over all workers' shares.

    Args:
        images: uint8 (N, H, W, C); each worker takes every ``world``-th image.
    """
    system.eval()
    context = autocast(config, images.device)
    sums = torch.zeros(5, dtype=torch.float64, device=images.device)
    mine_images, mine_labels = images[rank::world], labels[rank::world]
    for start in range(0, len(mine_images), config.train.eval_batch_size):
        chosen = slice(start, start + config.train.eval_batch_size)
        batch, target = as_input(mine_images[chosen]), mine_labels[chosen]
        with context():
            terms = system(batch, target, round_to_8bit=True)
        correct = (terms.logits.argmax(1) == target).sum()
        means = torch.stack((terms.loss, terms.classification, terms.distance)).double()
        sums += torch.cat((means * len(target), torch.stack((correct, torch.tensor(len(target), device=sums.device)))))
    loss, classification, distance, correct_sum, num = total(sums).tolist()
    return {
        "val_loss": loss / num,
        "val_classification_loss": classification / num,
        "val_feature_distance": distance / num,
        "val_accuracy": correct_sum / num,
    }


def fit(
    config: Config,
    sink: Sink,
    phi: StateDict | None = None,
    key: Key | None = None,
    load: Callable[[], TrainingData] | None = None,
) -> Fit:
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
    set_up_torch(config)
    load = load or (lambda: load_data(config, sink.device, sink.rank, sink.world, key))
    loop = _Loop(config, sink, phi, key, _together(load))
    return loop.run(*_together(loop.restore))


def set_up_torch(config: Config) -> None:
    """Make the settings of this process that training depends on."""
    torch.use_deterministic_algorithms(config.train.deterministic, warn_only=True)
    # A debugging aid of deterministic mode that would write every new tensor once more.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = not config.train.deterministic


T = TypeVar("T")


def _together(step: Callable[[], T]) -> T:
    """Take a step on every worker; if it fails on one, all stop with the first one's reason and none waits for ever."""
    problem: str | None = None
    try:
        done = step()
    except RayppError as error:
        problem = str(error)
    if (problem := first_error(problem)) is not None:
        raise StoppedError(problem)
    return done


class _Loop:
    """The state of one run: which phase and epoch it is in, the networks, the best of them so far."""

    def __init__(self, config: Config, sink: Sink, phi: StateDict | None, key: Key | None, data: TrainingData) -> None:
        self.config, self.sink, self.phi, self.key, self.data = config, sink, phi, key, data
        self.protected_already = PROTECTIONS.get(config.protection.name).augment == "after"
        self.phases = phases(config)
        self.history: list[Row] = []
        self.plain: StateDict | None = None
        self.best_state: StateDict = {}
        self.best: Row = {}
        self.newest = "none yet"
        self.last_progress = 0.0

    def run(self, at_phase: int, at_epoch: int, resumed: dict[str, Any] | None) -> Fit:
        for index in range(at_phase, len(self.phases)):
            phase = self.phases[index]
            self.enter(phase, resumed if index == at_phase else None)
            for epoch in range(at_epoch if index == at_phase else 0, phase.epochs):
                row = self.train_epoch(phase, epoch)
                row |= validate(self.system, *self.data.val, self.config, self.sink.rank, self.sink.world)
                if not math.isfinite(row["val_loss"]):
                    raise self.diverged(row["step"], row["lr"])
                # "<=": of equal losses the later wins, as in the authors' released code.
                row["best"] = not self.best or row["val_loss"] <= self.best["val_loss"]
                self.history.append(row)
                if row["best"]:
                    self.best = row
                    self.best_state = {k: v.detach().cpu().clone() for k, v in self.system.own_state().items()}
                self.report(index, epoch)
            self.system.load_own_state(self.best_state)
            if phase.name == "plain":
                self.plain = {k: v.cpu() for k, v in self.system.classifier.state_dict().items()}
        self.system.eval()
        return Fit(self.system, self.plain, self.data, self.history, self.best)

    def enter(self, phase: Phase, resumed: dict[str, Any] | None) -> None:
        """Build a phase's networks and optimiser, or take them over from a checkpoint."""
        device = self.sink.device
        height, width = self.data.val[0].shape[1:3]
        self.system = build_system(
            self.config, phase, len(self.data.classes), (height, width), self.phi, self.plain, self.key
        ).to(device)
        if self.config.train.sync_batchnorm:
            synchronise_batch_norms(self.system)
        if self.config.train.channels_last:
            self.system.to(memory_format=torch.channels_last)
        self.parameters = [p for p in self.system.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(self.config.train.optimizer, self.parameters)
        self.best, self.best_state = {}, {}
        if resumed is not None:
            self.system.load_own_state(resumed["system"])
            self.optimizer.load_state_dict(resumed["optimizer"])
            self.best, self.best_state = resumed["best"], resumed["best_state"]
        self.forward: Callable[..., Terms] = self.system
        if distributed():
            # Running statistics are averaged once an epoch instead: training never reads them.
            self.forward = DistributedDataParallel(
                self.system, device_ids=[device] if device.type == "cuda" else None, broadcast_buffers=False
            )
        if self.config.train.compile:
            self.forward = torch.compile(self.forward)

    def train_epoch(self, phase: Phase, epoch: int) -> Row:
        """Take one pass over the training batches; return its row of metrics, means over all workers."""
        train, loader, device = self.config.train, self.data.train, self.sink.device
        context = autocast(self.config, device)
        self.system.train()
        # Dropout, where a net has it: the same after a resume, another on each worker.
        torch.manual_seed(generator(self.config.seed, self.epochs_before(phase) + epoch, self.sink.rank).initial_seed())
        sums = torch.zeros(4, dtype=torch.float64, device=device)
        bad_step = torch.tensor(-1, device=device)
        seen, step, began, lr = 0, 0, time.monotonic(), 0.0
        for step, (images, labels) in enumerate(loader.epoch(self.epochs_before(phase) + epoch)):
            lr = learning_rate(train, phase.epochs, epoch + min((step + 0.5) / loader.num_batches, 1.0))
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.zero_grad(set_to_none=True)
            with context():
                terms = self.forward(images, labels, protected_already=self.protected_already)
            terms.loss.backward()
            self.optimizer.step()
            with torch.no_grad():
                loss = terms.loss.detach()
                correct = (terms.logits.argmax(1) == labels).float().mean()
                sums += torch.stack((loss, terms.classification.detach(), terms.distance.detach(), correct)).double()
                bad_step = torch.where((bad_step < 0) & ~loss.isfinite(), step, bad_step)
            seen += len(labels)
            if step % CHECK_STEPS == CHECK_STEPS - 1:
                self.stop_if_bad(bad_step, phase, epoch)
            self.show(phase, epoch, step, seen / (time.monotonic() - began), sums)
        if not seen:
            raise TrainingError("a worker's share of the training images is less than one batch; see train.batch_size")
        steps = step + 1
        self.stop_if_bad(bad_step, phase, epoch)
        average_batch_statistics(self.system)
        seconds = time.monotonic() - began
        counts = total(torch.tensor([seen, steps], dtype=torch.float64, device=device)).tolist()
        loss_mean, classification, distance, accuracy = (total(sums) / counts[1]).tolist()
        return {
            "phase": phase.name,
            "epoch": epoch + 1,
            "epochs": phase.epochs,
            "step": self.steps_before(phase) + (epoch + 1) * loader.num_batches,
            "lr": lr,
            "train_loss": loss_mean,
            "train_classification_loss": classification,
            "train_feature_distance": distance,
            "train_accuracy": accuracy,
            "images_per_s": counts[0] / seconds,
            "seconds": round(seconds, 3),
            "world": self.sink.world,
        }

    def epochs_before(self, phase: Phase) -> int:
        return sum(p.epochs for p in self.phases[: self.phases.index(phase)])

    def steps_before(self, phase: Phase) -> int:
        return self.epochs_before(phase) * self.data.train.num_batches

    def stop_if_bad(self, bad_step: Tensor, phase: Phase, epoch: int) -> None:
        """Stop every worker when any of them met a loss that is not a number."""
        bad = int(bad_step)
        message = str(bad) if bad >= 0 else None
        if (found := first_error(message)) is not None:
            step = self.steps_before(phase) + epoch * self.data.train.num_batches + int(found)
            rate = learning_rate(
                self.config.train, phase.epochs, epoch + min((int(found) + 0.5) / self.data.train.num_batches, 1.0)
            )
            raise self.diverged(step, rate)

    def diverged(self, step: int, lr: float) -> StoppedError:
        return StoppedError(
            f"the loss is not a finite number at step {step} with learning rate {lr:.4g}; last good checkpoint: "
            f"{self.newest}; try a smaller train.optimizer.lr or train.alpha"
        )

    def show(self, phase: Phase, epoch: int, step: int, images_per_s: float, sums: Tensor) -> None:
        now = time.monotonic()
        if self.sink.rank or now - self.last_progress < PROGRESS_SECONDS:
            return
        self.last_progress = now
        batches = self.data.train.num_batches
        loss, _, _, accuracy = (sums / (step + 1)).tolist()
        self.sink.progress(
            {
                "phase": phase.name,
                "epoch": epoch + 1,
                "epochs": phase.epochs,
                "steps_done": self.steps_before(phase) + epoch * batches + step + 1,
                "steps_total": sum(p.epochs for p in self.phases) * batches,
                "images_per_s": images_per_s * self.sink.world,
                "loss": loss,
                "accuracy": accuracy,
            }
        )

    def report(self, index: int, epoch: int) -> None:
        name = f"epoch_{len(self.history):04d}"
        if self.sink.rank:
            self.sink.report(self.history, name, None)
        else:
            state = {
                "phase": index,
                "epoch": epoch + 1,
                "system": self.system.own_state(),
                "optimizer": self.optimizer.state_dict(),
                "best": self.best,
                "best_state": self.best_state,
                "plain": self.plain,
                "fingerprint": self.data.fingerprint,
            }
            with tempfile.TemporaryDirectory(prefix="raypp-") as folder:
                checkpoint.save(Path(folder), state, self.history)
                self.sink.report(self.history, name, Path(folder))
        self.newest = name

    def restore(self) -> tuple[int, int, dict[str, Any] | None]:
        """Take up the newest sound checkpoint: phase index, epochs done in it, and its state (None to begin afresh)."""
        names = self.sink.checkpoints()
        for name in names:
            try:
                with self.sink.open(name) as folder:
                    state, history = checkpoint.load(folder)
            except TrainingError as error:
                if self.sink.rank == 0:
                    self.sink.warn(f"{error}; going back to the one before")
                continue
            if state["fingerprint"] != self.data.fingerprint:
                raise DataError(
                    f"the training data is not what checkpoint {name} was trained on; "
                    "restore the data or start a run with another name"
                )
            self.history, self.plain, self.newest = history, state["plain"], name
            return state["phase"], state["epoch"], state
        if names:
            raise TrainingError(f"all checkpoints of this run are damaged: {', '.join(names)}")
        return 0, 0, None
