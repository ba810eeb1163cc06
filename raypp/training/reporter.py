"""Where a training loop reports: the only thing that differs between a plain process, Ray Train and Ray Tune."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from raypp.training.checkpoint import CheckpointStore, EpochMetrics
from raypp.utils.progress import ProgressListener
from raypp.utils.storage import Storage


class Reporter(Protocol):
    """What the loop needs of its surroundings; every worker has one."""

    rank: int
    world: int
    device: torch.device

    def checkpoints(self) -> list[str]:
        """Names of the run's checkpoints, newest first."""

    def open(self, name: str) -> Any:
        """Context manager that gives the checkpoint's folder as a local path."""

    def report(self, history: list[EpochMetrics], name: str, checkpoint: Path | None) -> None:
        """Record an epoch: ``history`` is every row so far. Called on every worker; rank 0 brings the checkpoint."""

    def save_mid_epoch(self, name: str, checkpoint: Path) -> None:
        """Store a checkpoint from within an epoch; called on rank 0."""

    def should_stop(self) -> bool:
        """Whether training shall write a checkpoint and end: one worker's yes is enough. Asked about once a second."""

    def progress(self, info: EpochMetrics) -> None:
        """Show where the epoch stands; called on rank 0, at most a few times a second."""

    def warn(self, message: str) -> None:
        """Tell the user something that does not stop the run; called on rank 0."""


class LocalReporter(CheckpointStore):
    """Reports to a run's folder from this process, or from each process of an initialised process group.

    Args:
        run: the run's folder.
        display: shows progress, rank 0's is used, and tells when to stop, any may.
        device: where to train; by default a GPU if there is one.
    """

    def __init__(self, run: Storage, display: ProgressListener, device: torch.device | None = None) -> None:
        distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if distributed else 0
        self.world = dist.get_world_size() if distributed else 1
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        super().__init__(run)
        self._display = display

    def should_stop(self) -> bool:
        return self._display.should_stop()

    def report(self, history: list[EpochMetrics], name: str, checkpoint: Path | None) -> None:
        if self.rank:
            return
        self.keep(history, name, checkpoint)
        self._display.epoch(history[-1])

    def progress(self, info: EpochMetrics) -> None:
        self._display.step(info)

    def warn(self, message: str) -> None:
        self._display.warn(message)
