"""Checkpoints, metrics and progress of a Ray Train worker."""

from __future__ import annotations

import math
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import ray.train
from ray.train import Checkpoint, CheckpointConsistencyMode, CheckpointUploadMode
from ray.train.torch import get_device

from raypp.cluster.progress_actor import RemoteProgress
from raypp.training.checkpoint import CHECKPOINTS, EpochMetrics, epochs_done, retention_score, to_json_lines
from raypp.training.reporter import Reporter
from raypp.utils.progress import ProgressListener
from raypp.utils.storage import Storage

SCORE = "score"  # the metric by which Ray keeps checkpoints


def watches_preemption() -> bool:
    """Whether Ray Train watches for nodes that are about to leave; the driver decides for all workers."""
    return os.environ.get("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "1").lower() in ("1", "true")


class TrainWorkerProgress(RemoteProgress):
    """Reports the progress of a Ray Train worker, and requests a checkpoint once a node of the workers is to leave.

    Args:
        run: the training's name in Prometheus; the task's by default.
        watch: whether to ask Ray for such notices; the same on all workers.
    """

    def __init__(self, actor: Any, task: str = "", run: str | None = None, *, watch: bool) -> None:
        super().__init__(actor, task, run)
        self._watch = watch
        self._leaving: set[str] = set()

    def should_save(self) -> bool:
        if not self._watch:
            return False
        info = ray.train.get_preemption_info()  # a collective of all workers, which get rank 0's answer
        new = set(info.preempted_node_ids) - self._leaving if info is not None else set()
        self._leaving |= new
        if new and ray.train.get_context().get_world_rank() == 0:
            seconds = info.deadline_ms / 1000 - time.time() if info.deadline_ms is not None else None
            when = f"in {max(0.0, seconds):.0f} s" if seconds is not None else "soon"
            self.warn(f"{len(new)} of the workers' nodes will leave {when}: writing a checkpoint")
        return bool(new)


class RayTrainReporter(Reporter):
    """Reports checkpoints and metrics to Ray Train, which deletes older checkpoints, and progress to the driver.

    :class:`Storage` uploads a checkpoint, so that it is complete or missing; Ray copies file by file. On object stores
    training continues during the upload.
    """

    def __init__(self, run: Storage, listener: ProgressListener) -> None:
        super().__init__(run, listener, get_device())
        self._registered: set[str] = set()  # in Ray's list
        self._unregistered: list[str] = []  # deleted after the next upload, since Ray does not know them
        self._idle = threading.Event()  # no upload is in progress
        self._idle.set()
        # Ray deletes a folder in it after its upload; the trainer's own folder ends with the call of report.
        self._staging = None if run.local else tempfile.TemporaryDirectory(prefix="raypp-")

    def on_resume(self, history: list[EpochMetrics], name: str) -> None:
        """Add the loaded checkpoint to Ray's list if it was written without Ray, or if its worker died before."""
        checkpoint = None
        if self.rank == 0:
            reported = ray.train.get_all_reported_checkpoints(consistency_mode=CheckpointConsistencyMode.COMMITTED)
            self._registered = {Path(entry.checkpoint.path).name for entry in reported}
            self._unregistered = [n for n in self.checkpoints() if n not in self._registered and n != name]
            checkpoint = None if name in self._registered else self._managed_checkpoint(name)
            self._registered.add(name)
        mode = CheckpointUploadMode.NO_UPLOAD
        ray.train.report(_reported_metrics(history, name), checkpoint=checkpoint, checkpoint_upload_mode=mode)

    def report(self, history: list[EpochMetrics], name: str, checkpoint: Path | None) -> None:
        self._report(history, name, checkpoint, to_json_lines(history))
        if checkpoint is not None:
            self.listener.epoch(history[-1])

    def save_mid_epoch(self, history: list[EpochMetrics], name: str, checkpoint: Path | None) -> None:
        self._report(history, name, checkpoint)

    def should_stop(self) -> bool:
        return self.rank == 0 and super().should_stop()

    def _report(
        self, history: list[EpochMetrics], name: str, folder: Path | None, metrics_file: bytes | None = None
    ) -> None:
        """Upload a checkpoint and add it to Ray's list; called on every worker, only rank 0 has a folder."""
        metrics = _reported_metrics(history, name)
        if folder is None:
            ray.train.report(metrics)
            return

        def upload(checkpoint: Checkpoint, _: str) -> Checkpoint:
            try:
                self._upload(Path(checkpoint.path), name, metrics_file)
            finally:
                self._idle.set()
            return self._managed_checkpoint(name)

        self._idle.wait()
        if name in self._registered:  # a damaged one: Ray would list it twice, and delete it with the first entry
            self._upload(folder, name, metrics_file)
            ray.train.report(metrics)
            return
        self._registered.add(name)
        mode = CheckpointUploadMode.SYNC
        if self._staging is not None:
            self._idle.clear()
            mode, folder = CheckpointUploadMode.ASYNC, _move_files(folder, Path(self._staging.name) / name)
        ray.train.report(
            metrics,
            checkpoint=Checkpoint.from_directory(folder),
            checkpoint_dir_name=f"{CHECKPOINTS}/{name}",
            checkpoint_upload_mode=mode,
            checkpoint_upload_fn=upload,
        )

    def _upload(self, folder: Path, name: str, metrics_file: bytes | None) -> None:
        self.run.upload(folder, f"{CHECKPOINTS}/{name}", last="checkpoint.json")
        if metrics_file is not None:
            self.run.write("metrics.jsonl", metrics_file)
        for other in self._unregistered:
            if other != name:
                self.run.delete(f"{CHECKPOINTS}/{other}")
        self._unregistered = []

    def _managed_checkpoint(self, name: str) -> Checkpoint:
        storage = ray.train.get_context().get_storage()  # Ray compares its filesystem and path with the checkpoint's
        return Checkpoint(f"{storage.experiment_fs_path}/{CHECKPOINTS}/{name}", storage.storage_filesystem)


def _reported_metrics(history: list[EpochMetrics], name: str) -> dict[str, Any]:
    """Metrics of a checkpoint as JSON knows them; within an epoch there are only its position and score."""
    position = epochs_done(name)
    row = history[-1] if history and position == len(history) else {}
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return finite | {"epochs_done": position, SCORE: retention_score(history, name)}


def _move_files(source: Path, target: Path) -> Path:
    target.mkdir(exist_ok=True)
    for file in source.iterdir():
        file.rename(target / file.name)
    return target
