"""Attacks that train a network in the project's trainer: their options, training task and interface."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from pydantic import model_validator
from torch import Tensor

from raypp.attacks.base import Attack, tensor_sha256
from raypp.config.overrides import deep_merge
from raypp.config.schema import OptimizationConfig
from raypp.data.loader import Augmentation, DeviceLoader
from raypp.models.perceptual import StateDict
from raypp.training.checkpoint import EpochMetrics
from raypp.training.distributed import run_on_all_ranks
from raypp.training.reporter import Reporter
from raypp.training.task import Phase, Task, TrainableModule
from raypp.training.trainer import Trainer
from raypp.utils.registry import MethodConfig


class TrainedOptions(MethodConfig):
    """Options of an attack that trains a network; settings missing in ``train`` have the attack's own defaults."""

    train: OptimizationConfig

    @model_validator(mode="before")
    @classmethod
    def _merge_with_defaults(cls, values: Any) -> Any:
        train = values.get("train") if isinstance(values, dict) else None
        if not isinstance(train, dict):
            return values
        default: OptimizationConfig = cls.model_fields["train"].default
        return values | {"train": deep_merge(default.model_dump(mode="json"), train)}


class AttackTask(Task):
    """A training task with one phase, whose batches workers can share.

    Args:
        attack: the attack with its options and knowledge.
        epochs: number of epochs.
        images: training images uint8 (N, C, H, W).
        indices: their numbers (N,), which come with the batches.
        protected: protected images that identify the data, unless the attacker has an oracle.
        augmentation: augmentation before protecting.
    """

    divergence_hint = "learning rate (optimizer.lr)"

    def __init__(
        self,
        attack: TrainedAttack,
        epochs: int,
        images: Tensor,
        indices: Tensor,
        protected: Tensor,
        augmentation: Augmentation,
    ) -> None:
        self.train, self.seed = attack.options.train, attack.seed
        self.phases = [Phase(attack.options.name, epochs)]
        self.images, self.indices, self.augmentation = images, indices, augmentation
        # An oracle may use a new key for each image, so its protected images do not identify the data.
        self.fingerprint = tensor_sha256(images, *([] if attack.access.has_oracle else [protected]))
        self.share(0, 1)

    def share(self, rank: int, world: int) -> None:
        """Set this worker's share of every batch."""
        self.batches = DeviceLoader(
            self.images.permute(0, 2, 3, 1),
            self.indices,
            batch_size=self.train.batch_size,
            seed=self.seed,
            augmentation=self.augmentation,
            rank=rank,
            world=world,
        )

    def on_phase_end(self, phase: Phase, trainee: TrainableModule) -> None:
        return

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        return


class TrainedAttack(Attack):
    """An attack that trains a network before :meth:`reconstruct`.

    The network trains in the project's trainer, so that it can stop, resume and run on several workers. :meth:`task`
    defines the training, and :meth:`load` takes its result.
    """

    @property
    @abstractmethod
    def num_images(self) -> int:
        """Number of training images, without those for validation."""

    @abstractmethod
    def task(self, share_epochs: float = 1.0, num_images: int | None = None) -> AttackTask:
        """Build the training task.

        Args:
            share_epochs: fraction of the epochs.
            num_images: number of training images, None for all; the number of steps stays the same.
        """

    def _num_epochs(self, share_epochs: float, num_images: int | None) -> int:
        """Epochs of :meth:`task`: more of them on fewer images, for the same number of steps."""
        epochs: int = max(1, round(self.options.train.epochs * share_epochs))
        if num_images is not None and num_images < self.num_images:
            epochs = max(1, round(epochs * self.num_images / num_images))
        return epochs

    @abstractmethod
    def state(self, trainee: Any) -> StateDict:
        """Weights of a trained task that :meth:`reconstruct` needs."""

    @abstractmethod
    def load(self, state: StateDict) -> None:
        """Load weights that :meth:`state` returned."""


def train_attack(
    attack: TrainedAttack, reporter: Reporter, share_epochs: float = 1.0, num_images: int | None = None
) -> tuple[StateDict, list[EpochMetrics]]:
    """Train an attack's network, see :meth:`TrainedAttack.task`; returns its weights and the metrics of each epoch."""
    task = attack.task(share_epochs, num_images)
    run_on_all_ranks(lambda: task.share(reporter.rank, reporter.world))  # refuses fewer images than workers
    result = Trainer(task, reporter).train()
    return attack.state(result.trainee), result.history
