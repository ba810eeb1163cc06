"""Where a training loop reports: the only thing that differs between a plain process, Ray Train and Ray Tune."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from raypp.utils.progress import Shows
from raypp.utils.storage import Storage

Row = dict[str, Any]
CHECKPOINTS = "checkpoints"
NAME = re.compile(r"epoch_(?P<epochs>\d+)(_part_(?P<part>\d+))?")
PART_DIGITS = 6
KEEP = 2  # the newest, and one more in case the newest turns out to be damaged


class Sink(Protocol):
    """What the loop needs of its surroundings; every worker has one."""

    rank: int
    world: int
    device: torch.device

    def checkpoints(self) -> list[str]:
        """Names of the run's checkpoints, newest first."""

    def open(self, name: str) -> Any:
        """Context manager that gives the checkpoint's folder as a local path."""

    def report(self, history: list[Row], name: str, checkpoint: Path | None) -> None:
        """Record an epoch: ``history`` is every row so far. Called on every worker; rank 0 brings the checkpoint."""

    def keep_within(self, name: str, checkpoint: Path) -> None:
        """Store a checkpoint from within an epoch; called on rank 0."""

    def told_to_stop(self) -> bool:
        """Whether training shall write a checkpoint and end: one worker's yes is enough. Asked about once a second."""

    def progress(self, info: Row) -> None:
        """Show where the epoch stands; called on rank 0, at most a few times a second."""

    def warn(self, message: str) -> None:
        """Tell the user something that does not stop the run; called on rank 0."""


def metrics_lines(history: list[Row]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in history).encode()


def checkpoint_name(epochs: int, part: float = 0.0) -> str:
    """After so many epochs of all phases, and this share of the next: steps are other ones with other workers."""
    return f"epoch_{epochs:04d}" + (f"_part_{round(part * 10**PART_DIGITS):0{PART_DIGITS}d}" if part else "")


def newest_first(run: Storage) -> list[str]:
    """Names of the checkpoints under a run's folder, newest first."""
    found = [NAME.fullmatch(name) for name in run.folder(CHECKPOINTS).folders()]
    named = {match[0]: (int(match["epochs"]), int(match["part"] or 0)) for match in found if match is not None}
    return sorted(named, key=named.__getitem__, reverse=True)


def prune(run: Storage, written: str) -> None:
    """Delete all but the newest checkpoints, and never the one just written: damaged ones may seem newer."""
    others = [name for name in newest_first(run) if name != written]
    for old in others[KEEP - 1 :]:
        run.delete(f"{CHECKPOINTS}/{old}")


class RunCheckpoints:
    """The checkpoints in a run's folder, which every sink of a training run reads alike."""

    def __init__(self, run: Storage) -> None:
        self._run = run

    def checkpoints(self) -> list[str]:
        return newest_first(self._run)

    @contextmanager
    def open(self, name: str) -> Iterator[Path]:
        with self._run.folder(CHECKPOINTS).download(name) as folder:
            yield folder

    def keep_within(self, name: str, checkpoint: Path) -> None:
        self._run.upload(checkpoint, f"{CHECKPOINTS}/{name}", last="checkpoint.json")
        prune(self._run, name)

    def keep(self, history: list[Row], name: str, checkpoint: Path | None) -> None:
        """Store an epoch: its checkpoint whole or not at all, then the rows up to it; called on rank 0."""
        if checkpoint is not None:
            self.keep_within(name, checkpoint)
        self._run.write("metrics.jsonl", metrics_lines(history))


class LocalSink(RunCheckpoints):
    """Reports to a run's folder from this process, or from each process of an initialised process group.

    Args:
        run: the run's folder.
        display: shows progress, rank 0's is used, and tells when to stop, any may.
        device: where to train; by default a GPU if there is one.
    """

    def __init__(self, run: Storage, display: Shows, device: torch.device | None = None) -> None:
        distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if distributed else 0
        self.world = dist.get_world_size() if distributed else 1
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        super().__init__(run)
        self._display = display

    def told_to_stop(self) -> bool:
        return self._display.told_to_stop()

    def report(self, history: list[Row], name: str, checkpoint: Path | None) -> None:
        if self.rank:
            return
        self.keep(history, name, checkpoint)
        self._display.epoch(history[-1])

    def progress(self, info: Row) -> None:
        self._display.step(info)

    def warn(self, message: str) -> None:
        self._display.warn(message)
