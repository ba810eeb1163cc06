"""Reporters store checkpoints and show progress, in a plain process, in Ray Train or in Ray Tune."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from raypp.training.checkpoint import CheckpointStore, EpochMetrics
from raypp.utils.progress import ProgressListener
from raypp.utils.storage import Storage


class Reporter(Protocol):
    """The trainer's interface to its environment; every worker has one."""

    rank: int
    world: int
    device: torch.device

    def checkpoints(self) -> list[str]:
        """Names of the run's checkpoints, newest first."""

    def open(self, name: str) -> Any:
        """Open a checkpoint as a local folder; a context manager."""

    def report(self, history: list[EpochMetrics], name: str, checkpoint: Path | None) -> None:
        """Record an epoch; called on every worker. ``history`` holds all epochs; only rank 0 has a checkpoint."""

    def save_mid_epoch(self, name: str, checkpoint: Path) -> None:
        """Store a checkpoint within an epoch; called on rank 0."""

    def should_stop(self) -> bool:
        """Whether to save a checkpoint and stop; called about once a second, and True on one worker stops all."""

    def progress(self, info: EpochMetrics) -> None:
        """Show the progress of the epoch; called on rank 0, at most a few times a second."""

    def warn(self, message: str) -> None:
        """Show a warning; called on rank 0."""


class LocalReporter(CheckpointStore):
    """Reports to a run's folder from this process, or from each process of an initialized process group.

    Args:
        run: the run's folder.
        display: rank 0's shows progress; every rank's can request a stop.
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
