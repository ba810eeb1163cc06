"""The trainer's interface to its environment, in a plain process, in Ray Train or in Ray Tune."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

import torch
import torch.distributed as dist

from raypp.training.checkpoint import CHECKPOINTS, EpochMetrics, list_checkpoints, prune, to_json_lines
from raypp.training.distributed import is_distributed
from raypp.utils.device import default_device
from raypp.utils.progress import ProgressListener
from raypp.utils.storage import Storage


class Reporter:
    """Stores checkpoints in a run's folder and reports progress to a listener; every worker has a reporter.

    Its workers are the processes of an initialized process group, or this one.

    Args:
        run: the run's folder.
        listener: rank 0's receives progress; every rank's can request a stop.
        device: where to train; by default a GPU if there is one.
    """

    def __init__(self, run: Storage, listener: ProgressListener, device: torch.device | None = None) -> None:
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if is_distributed() else (0, 1)
        self.device = device or default_device()
        self.run, self.listener = run, listener

    def checkpoints(self) -> list[str]:
        """Names of the run's checkpoints, newest first."""
        return list_checkpoints(self.run)

    def open(self, name: str) -> AbstractContextManager[Path]:
        """Open a checkpoint as a local folder."""
        return self.run.folder(CHECKPOINTS).download(name)

    def on_resume(self, history: list[EpochMetrics], name: str) -> None:
        """Called on every worker after checkpoint ``name`` is loaded; ``history`` holds all epochs before it."""

    def report(self, history: list[EpochMetrics], name: str, checkpoint: Path | None) -> None:
        """Record an epoch; called on every worker. ``history`` holds all epochs; only rank 0 has a checkpoint."""
        if checkpoint is not None:
            self.save(history, name, checkpoint)
            self.listener.epoch(history[-1])

    def save(self, history: list[EpochMetrics], name: str, checkpoint: Path) -> None:
        """Store an epoch: first its complete checkpoint, then the metrics of all epochs so far."""
        self.save_mid_epoch(history, name, checkpoint)
        self.run.write("metrics.jsonl", to_json_lines(history))

    def save_mid_epoch(self, history: list[EpochMetrics], name: str, checkpoint: Path | None) -> None:
        """Store a checkpoint within an epoch; called on every worker, only rank 0 has a checkpoint."""
        if checkpoint is not None:
            self.run.upload(checkpoint, f"{CHECKPOINTS}/{name}", last="checkpoint.json")
            prune(self.run, name)

    def should_save(self) -> bool:
        """Whether to save a checkpoint soon; called on every worker about once a second."""
        return self.listener.should_save()

    def should_stop(self) -> bool:
        """Whether to save a checkpoint and stop; called about once a second, and True on one worker stops all."""
        return self.listener.should_stop()
