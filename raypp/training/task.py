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
    """One stretch of epochs with its own networks, optimiser and schedule."""

    name: str
    epochs: int


@dataclass
class StepOutput:
    """What a step gives: the loss to minimise, and what to report beside it; all are means over the batch."""

    loss: Tensor
    metrics: dict[str, Tensor]


@dataclass
class EpochState:
    """What an epoch has come to: of one worker, or, in a checkpoint, of all of them together."""

    step: int
    """Steps done, of each worker."""
    names: list[str]
    sums: Tensor
    """Of each term over images."""
    images: int
    seconds: float


class TrainableModule(nn.Module):
    """The networks of one phase; ``forward(images, labels)`` gives :class:`Terms`."""

    fixed: tuple[str, ...] = ()
    """Prefixes of weights that come from elsewhere and are not stored."""

    def trainable_state_dict(self) -> StateDict:
        """Weights of all that is trained."""
        return {k: v for k, v in self.state_dict().items() if not k.startswith(self.fixed or ("\0",))}

    def load_trainable_state_dict(self, state: StateDict) -> None:
        other = TrainingError("checkpoint holds weights of other networks than the configuration describes")
        try:
            missing, unexpected = self.load_state_dict(state, strict=False)
        except RuntimeError as error:  # a shape is another one
            raise other from error
        if unexpected or any(not key.startswith(self.fixed or ("\0",)) for key in missing):
            raise other

    def groups(self) -> list[dict[str, Any]]:
        """What is trained: ``params``, and by which ``factor`` of the learning rate."""
        return [{"params": [p for p in self.parameters() if p.requires_grad], "factor": 1.0}]

    def on_after_optimizer_step(self) -> None:
        """Called after every step of the optimiser."""


class Task(Protocol):
    """What a loop trains, and how it is judged."""

    seed: int
    train: OptimizationConfig
    phases: list[Phase]
    batches: BatchLoader
    fingerprint: str
    """Of the data: a checkpoint is taken up only with the same."""
    divergence_hint: str
    """Settings to make smaller when training diverges."""

    def build(self, phase: Phase) -> TrainableModule:
        """The networks of a phase, freshly initialised from the seed."""

    def validate(self, trainee: TrainableModule, rank: int, world: int) -> EpochMetrics:
        """Numbers after an epoch, over all workers. The networks with the lowest ``val_loss`` are kept; where a task
        gives none, the last."""

    def end(self, phase: Phase, trainee: TrainableModule) -> None:
        """A phase is over; ``trainee`` has the weights that were kept."""

    def state(self) -> dict[str, Any]:
        """What later phases need of earlier ones, for a checkpoint."""

    def restore(self, state: dict[str, Any]) -> None:
        """Take up what ``state`` gave."""


@dataclass(frozen=True)
class TrainingOutcome:
    """What a loop leaves behind: the networks at their lowest validation loss, and how they got there."""

    trainee: TrainableModule
    history: list[EpochMetrics]
    best: EpochMetrics
