"""What the trainer trains: phases, modules, steps and validation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from raypp.config.schema import OptimizationConfig
from raypp.data.loader import BatchLoader
from raypp.models.perceptual import StateDict
from raypp.training.checkpoint import EpochMetrics
from raypp.utils.errors import TrainingError


@dataclass(frozen=True)
class Phase:
    """A number of epochs with their own networks, optimizer and schedule."""

    name: str
    epochs: int


@dataclass
class StepOutput:
    """Output of a training step: the loss, and metrics to log, averaged over the batch."""

    loss: Tensor
    metrics: dict[str, Tensor]


@dataclass
class EpochState:
    """Progress within an epoch: of one worker, or in a checkpoint of all workers together."""

    step: int
    """Steps done by each worker."""
    names: list[str]
    sums: Tensor
    """Sum of the loss and each metric over images."""
    images: int
    seconds: float


class TrainableModule(nn.Module):
    """The networks of a phase; ``forward(images, labels)`` returns a :class:`StepOutput`."""

    frozen_prefixes: tuple[str, ...] = ()
    """Prefixes of weights that come from elsewhere, such as a feature network; checkpoints do not store them."""

    def trainable_state_dict(self) -> StateDict:
        return {k: v for k, v in self.state_dict().items() if not k.startswith(self.frozen_prefixes)}

    def load_trainable_state_dict(self, state: StateDict) -> None:
        mismatch = TrainingError("checkpoint holds weights of other networks than the configuration describes")
        try:
            missing, unexpected = self.load_state_dict(state, strict=False)
        except RuntimeError as error:  # a shape differs
            raise mismatch from error
        if unexpected or any(not key.startswith(self.frozen_prefixes) for key in missing):
            raise mismatch

    def param_groups(self) -> list[dict[str, Any]]:
        """Parameter groups of the optimizer: ``params``, and ``factor``, which scales the learning rate."""
        return [{"params": [p for p in self.parameters() if p.requires_grad], "factor": 1.0}]

    def on_after_optimizer_step(self) -> None:
        """Called after every step of the optimizer."""

    def reinitialize(self) -> list[nn.Parameter]:
        """Initialize networks again that are due; called after every step of the optimizer.

        Returns their parameters; the trainer clears their state in the optimizer.
        """
        return []


class Task(Protocol):
    """The networks, data and validation of a training run."""

    seed: int
    train: OptimizationConfig
    phases: list[Phase]
    batches: BatchLoader
    fingerprint: str
    """Hash of the data; a checkpoint loads only with the same data."""
    divergence_hint: str
    """Names of the settings to reduce when training diverges, for the error message."""

    def build(self, phase: Phase) -> TrainableModule:
        """Build the networks of a phase, initialized from the seed."""

    def validate(self, trainee: TrainableModule, rank: int, world: int) -> EpochMetrics:
        """Compute metrics after an epoch, over all workers.

        Training ends with the weights of the lowest ``val_loss``, or without that metric with the last ones.
        """

    def on_phase_end(self, phase: Phase, trainee: TrainableModule) -> None:
        """Called at the end of a phase; ``trainee`` has the weights of the best epoch."""

    def state_dict(self) -> dict[str, Any]:
        """Results of earlier phases that later ones need, for a checkpoint."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned."""


@dataclass(frozen=True)
class TrainingOutcome:
    """The networks with their lowest validation loss, and the metrics of all epochs."""

    trainee: TrainableModule
    history: list[EpochMetrics]
    best: EpochMetrics
