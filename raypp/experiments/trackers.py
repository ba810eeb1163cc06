"""Clients of TensorBoard, MLflow and Weights & Biases, by the name that ``--track`` takes."""

from __future__ import annotations

import os
import tempfile
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import yaml

from raypp.utils.registry import Registry
from raypp.utils.storage import Storage

PROJECT = "raypp"  # by default the experiment of MLflow and the project of Weights & Biases

TRACKERS = Registry(
    "tracker",
    {
        "tensorboard": "raypp.experiments.trackers:TensorBoard",
        "mlflow": "raypp.experiments.trackers:MLflow",
        "wandb": "raypp.experiments.trackers:WeightsAndBiases",
    },
)


class Tracker(ABC):
    """Receives the settings and metrics of one run.

    Args:
        folder: for files of the tracker.
        name: of the run.
        group: the search of a trial; None for a run outside a search.
        settings: by dotted key.
        run_id: identifier of the run in the tracker, from its last start.

    Attributes:
        package: the package that the tracker needs.
        run_id: continues the run after a resume; None for a tracker without identifiers.
    """

    package: ClassVar[str]

    def __init__(
        self, folder: Storage, name: str, group: str | None, settings: Mapping[str, Any], run_id: str | None
    ) -> None:
        self.folder, self.run_id = folder, run_id

    @abstractmethod
    def log(self, metrics: Mapping[str, float], epoch: int) -> None:
        """Record metrics after ``epoch`` epochs of all phases."""

    @abstractmethod
    def finish(self, *, succeeded: bool) -> None:
        """End the run."""


class LocalFolder:
    """A local folder for files of a tracker, which are uploaded if ``storage`` is remote."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._temporary = None if storage.local else tempfile.TemporaryDirectory(prefix="raypp-")
        self.path = storage.path if self._temporary is None else Path(self._temporary.name)
        self.path.mkdir(parents=True, exist_ok=True)

    def sync(self) -> None:
        """Upload the files of this process; those of earlier processes stay."""
        if self._temporary is not None:
            for path in filter(Path.is_file, self.path.rglob("*")):
                self._storage.write(path.relative_to(self.path).as_posix(), path.read_bytes())


class TensorBoard(Tracker):
    """Event files, with the settings as text and as hyperparameters."""

    package = "tensorboardX"
    FLUSH_SECONDS = 1  # of the writer's thread; its method flush() leaves out events that the thread has not received

    def __init__(
        self, folder: Storage, name: str, group: str | None, settings: Mapping[str, Any], run_id: str | None
    ) -> None:
        super().__init__(folder, name, group, settings, run_id)
        from tensorboardX import SummaryWriter

        self._files = LocalFolder(folder)
        # Without a suffix, two files of one second have one name.
        suffix = f".{uuid.uuid4().hex[:8]}"
        self._writer = SummaryWriter(
            str(self._files.path / "tensorboard"), flush_secs=self.FLUSH_SECONDS, filename_suffix=suffix
        )
        text = yaml.safe_dump(dict(settings), sort_keys=False)
        self._writer.add_text("settings", "".join(f"    {line}\n" for line in text.splitlines()))  # Markdown's code
        self._settings = {
            key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in settings.items()
        }
        self._newest: dict[str, float] = {}

    def log(self, metrics: Mapping[str, float], epoch: int) -> None:
        self._newest |= metrics
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, epoch)
        self._files.sync()

    def finish(self, *, succeeded: bool) -> None:
        from tensorboardX.summary import hparams

        for summary in hparams(self._settings, self._newest):
            self._writer.file_writer.add_summary(summary)
        self._writer.close()
        self._files.sync()


class MLflow(Tracker):
    """A run of an MLflow server or store, which MLflow's variables such as MLFLOW_TRACKING_URI select."""

    package = "mlflow"
    BATCH = 100  # parameters that MLflow accepts at once

    def __init__(
        self, folder: Storage, name: str, group: str | None, settings: Mapping[str, Any], run_id: str | None
    ) -> None:
        super().__init__(folder, name, group, settings, run_id)
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._client, self._metric = MlflowClient(), Metric
        if self.run_id is not None:
            self._client.update_run(self.run_id, status="RUNNING")
            return
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME") or group or PROJECT
        known = self._client.get_experiment_by_name(experiment)
        experiment_id = known.experiment_id if known is not None else self._client.create_experiment(experiment)
        self.run_id = self._client.create_run(experiment_id, run_name=name).info.run_id
        params = [Param(key, str(value)) for key, value in settings.items()]
        for batch in _batches(params, self.BATCH):
            self._client.log_batch(self.run_id, params=batch)

    def log(self, metrics: Mapping[str, float], epoch: int) -> None:
        now = int(1000 * time.time())
        self._client.log_batch(self.run_id, [self._metric(key, value, now, epoch) for key, value in metrics.items()])

    def finish(self, *, succeeded: bool) -> None:
        self._client.set_terminated(self.run_id, "FINISHED" if succeeded else "FAILED")


class WeightsAndBiases(Tracker):
    """A run of Weights & Biases, which its variables such as WANDB_PROJECT and WANDB_MODE configure."""

    package = "wandb"
    _active: ClassVar[int] = 0  # runs of this process
    _finished: ClassVar[list[LocalFolder]] = []  # of runs that wandb may still write

    def __init__(
        self, folder: Storage, name: str, group: str | None, settings: Mapping[str, Any], run_id: str | None
    ) -> None:
        super().__init__(folder, name, group, settings, run_id)
        import wandb

        self._files = LocalFolder(folder)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            group=group,
            name=name,
            id=run_id,
            resume="allow",
            config=dict(settings),
            dir=str(self._files.path),  # wandb adds the folder wandb
            reinit="create_new",  # trials of a search are active at once
            settings=wandb.Settings(silent=True, console="off"),
        )
        self.run_id = self._run.id
        WeightsAndBiases._active += 1
        # The steps of wandb only grow, and a trial of a population goes back to epochs of another.
        self._run.define_metric("*", step_metric="epoch")

    def log(self, metrics: Mapping[str, float], epoch: int) -> None:
        self._run.log({**metrics, "epoch": epoch})

    def finish(self, *, succeeded: bool) -> None:
        import wandb

        self._run.finish(exit_code=0 if succeeded else 1)
        WeightsAndBiases._active -= 1
        self._finished.append(self._files)
        if not self._active:
            wandb.teardown()  # returns once all files are written; finish() does not wait for them
            while self._finished:
                self._finished.pop().sync()


def _batches(values: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(values), size):
        yield values[start : start + size]
