"""Estimates of the time of a training, a table, a search or an attack run, measured on a few steps on this machine."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from raypp.attacks import ATTACKS
from raypp.attacks.base import AttackError, required
from raypp.attacks.suite import CURVE
from raypp.attacks.trained import TrainedAttack
from raypp.config.overrides import Settings
from raypp.config.schema import Config
from raypp.data import SOURCES
from raypp.data.base import stratified_split
from raypp.data.loader import Augmentation, DeviceLoader
from raypp.experiments.attack_plan import AttackPlan, dependencies_first
from raypp.experiments.client_classifier import PLAIN_CLASSIFIERS, missing_classifiers
from raypp.experiments.search import make_search_plan
from raypp.experiments.table1_grid import grid_cells, table_rows
from raypp.experiments.training_run import new_key
from raypp.models.perceptual import VGG16Features, random_vgg_slice
from raypp.training.protection_task import ProtectionTask, TrainingData, build_pre_transform
from raypp.training.reporter import Reporter
from raypp.training.task import Task
from raypp.training.trainer import Trainer
from raypp.utils.device import default_device
from raypp.utils.errors import DataError
from raypp.utils.progress import ProgressDisplay
from raypp.utils.storage import Storage

if TYPE_CHECKING:
    from raypp.attacks.target import Target
    from raypp.data.base import DataSource

NUM_TIMED = 9  # steps that are timed after a first one, at most
MAX_SECONDS, MAX_SECONDS_FOR_THREE = 3.0, 6.0  # after which no other step begins
NUM_IMAGES = 5000  # of the attacker, to time the steps of attacks: some protect all images before their first step
OVERHEAD = 1.15  # validation, checkpoints and reading of data, as a share of the steps


@dataclass(frozen=True)
class Estimate:
    """The time of one training: a phase of a run, a cell of a table or an attack; ``seconds`` is None if unknown."""

    name: str
    detail: str
    seconds: float | None


def estimate_training(config: Config) -> list[Estimate]:
    """Estimate each phase of a run on one process, with random weights of the feature network; downloads nothing.

    Raises:
        ConfigError, DataError: the settings, the source or the sizes of its splits are not usable.
    """
    features = config.features
    phi = random_vgg_slice(features.layer) if isinstance(features, VGG16Features.Options) else None
    source = SOURCES.build(config.data.source, size=config.data.image_size, channels=config.data.channels)
    total = source.published_sizes.get("train") or source.num_images("train")
    remaining, _ = stratified_split(np.zeros(total, dtype=np.int64), config.data.num_val, config.seed)
    num_images = config.data.num_train or len(remaining)
    device = default_device(config.cluster.gpu)
    task = ProtectionTask(config, _random_data(config, source, device), phi, new_key(config))
    num_batches = max(1, num_images // config.train.batch_size)
    return [_estimate_phase(task, index, num_batches, num_images, device) for index in range(len(task.phases))]


def estimate_table(
    presets: Sequence[str], methods: Sequence[str] | None, seeds: Sequence[int], settings: Settings
) -> list[Estimate]:
    """Estimate each cell of Table I on one process; cells that differ in the seed only are measured once."""
    names = list(table_rows()) if methods is None else methods
    cells = grid_cells(presets, names, seeds[:1], settings, Storage("table"))
    estimates = []
    for cell in cells:
        seconds = sum(estimate.seconds or 0 for estimate in estimate_training(cell.config))
        detail = f"{cell.config.train.epochs} epochs, {len(seeds)} seed{'s' * (len(seeds) != 1)}"
        estimates.append(Estimate(f"{cell.dataset} {cell.method.name}", detail, seconds * len(seeds)))
    return estimates


def estimate_search(preset: str, files: Sequence[Path], settings: Settings) -> list[Estimate]:
    """Estimate the trainings of a search at the preset's own values; its attacks are not included."""
    plan = make_search_plan(preset, files, settings, name="estimate")
    seconds = sum(estimate.seconds or 0 for estimate in estimate_training(plan.config))
    num = plan.search.num_trials
    detail = f"{num} trials of {plan.config.train.epochs} epochs, one after the other, without their attacks"
    return [Estimate(preset, detail, seconds * num)]


def estimate_attacks(plan: AttackPlan, target: Target) -> list[Estimate]:
    """Estimate each attack on a loaded target that trains a network, with its curve, and each plain classifier."""
    estimates, access = [], target.access
    if access.protect is not None:
        access = access.with_images(required(access.images)[:NUM_IMAGES], required(access.labels)[:NUM_IMAGES])
    for name in dependencies_first(plan):
        kind, options = ATTACKS.get(name), plan.suite.options(name)
        try:
            attack = kind(options, access, seed=plan.suite.seed)
        except AttackError as error:
            estimates.append(Estimate(name, str(error), 0))
            continue
        if not isinstance(attack, TrainedAttack):
            estimates.append(Estimate(name, "trains no network", None))
            continue
        task, num_images = attack.task(), kind(options, target.access, seed=plan.suite.seed).num_images
        task.share(0, 1)
        batches = math.ceil(task.batches.num_batches * num_images / attack.num_images)
        estimate = _estimate_phase(task, len(task.phases) - 1, batches, num_images, access.device)
        shares = [share for _, share, _ in CURVE if share == 1 or task.train.epochs > 1] if plan.suite.curve else []
        assert estimate.seconds is not None
        curve = f", and {len(shares)} more trainings for its curve" if shares else ""
        estimates.append(Estimate(name, estimate.detail + curve, estimate.seconds * (1 + sum(shares))))
    for name in missing_classifiers(plan, target):
        (training,) = estimate_training(PLAIN_CLASSIFIERS[name](plan, target))
        estimates.append(replace(training, name=name))
    return estimates


def _estimate_phase(task: Task, index: int, num_batches: int, num_images: int, device: torch.device) -> Estimate:
    phase = task.phases[index]
    seconds = seconds_per_step(task, index, device) * num_batches * phase.epochs * OVERHEAD
    return Estimate(phase.name, f"{phase.epochs} epochs of {num_images:,} images", seconds)


def seconds_per_step(task: Task, phase_index: int, device: torch.device) -> float:
    """Median time of a few training steps of a phase on the device of its data, in seconds per step."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(task, Reporter(Storage(folder), ProgressDisplay(quiet=True), device))
        trainer.setup_phase(task.phases[phase_index])
        trainer.start_epoch(phase_index, 0)
        times = list(islice(_timed_steps(trainer), 1 + NUM_TIMED))
    return statistics.median(times[1:] or times)


def _timed_steps(trainer: Trainer) -> Iterator[float]:
    begin = time.monotonic()
    for step, (images, labels) in enumerate(trainer.task.batches.epoch(0)):
        start = time.monotonic()
        trainer.train_step(step, images, labels)
        if trainer.reporter.device.type == "cuda":
            torch.cuda.synchronize()
        yield time.monotonic() - start
        if time.monotonic() - begin > (MAX_SECONDS if step >= 3 else MAX_SECONDS_FOR_THREE):
            return


def _random_data(config: Config, source: DataSource, device: torch.device) -> TrainingData:
    """Random images of the source's size, enough for the timed steps."""
    size = config.data.image_size or source.size
    if size is None:
        image = next(iter(source.examples("train"))).image
        if isinstance(image, DataError):
            raise image
        size = (image.shape[0], image.shape[1])
    num = config.train.batch_size * (1 + NUM_TIMED)
    images = torch.randint(0, 256, (num, *size, config.data.channels), dtype=torch.uint8, device=device)
    labels = torch.randint(0, 10, (num,), device=device)
    loader = DeviceLoader(
        images,
        labels,
        batch_size=config.train.batch_size,
        seed=config.seed,
        augmentation=Augmentation(config.data.augment.crop_padding, config.data.augment.flip),
        first=build_pre_transform(config, new_key(config)),
    )
    return TrainingData(loader, (images[:2], labels[:2]), tuple(map(str, range(10))), num, "")
