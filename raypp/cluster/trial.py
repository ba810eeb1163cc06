"""The training function of a Ray Tune trial."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune

from raypp.cluster.progress_actor import RemoteProgress
from raypp.cluster.session import uses_gpu
from raypp.cluster.shared_files import separate_files
from raypp.cluster.train import train_on_ray
from raypp.config.schema import Config
from raypp.data.splits import enable_split_cache
from raypp.experiments import pareto, plots, search, search_trial
from raypp.experiments.run_folder import read_checked
from raypp.experiments.search import Range, Search, SearchPlan, TrialRecord
from raypp.experiments.tracking import epochs_before
from raypp.experiments.training_run import Run, finalize_run
from raypp.training.checkpoint import CHECKPOINTS, EpochMetrics, checkpoint_name
from raypp.training.protected_classifier import phases
from raypp.training.protection_task import fit
from raypp.training.reporter import Reporter
from raypp.training.task import Phase
from raypp.utils.errors import TrainingInterrupted
from raypp.utils.progress import ProgressListener, Row
from raypp.utils.runtime import VERBOSE
from raypp.utils.storage import Storage

STOPPED = "stopped"  # event of a trial that has stopped on request


class TuneListener(ProgressListener):
    """Reports each epoch of a trial to Tune, and stops the trial on request."""

    def __init__(self, plan: SearchPlan, min_accuracy: float | None, driver: RemoteProgress) -> None:
        self.plan, self.min_accuracy, self.driver = plan, min_accuracy, driver
        self.phases: list[Phase] = []  # set once the configuration of the run is known

    def step(self, info: Row) -> None:
        """Export a step; the workers of a distributed trial export theirs."""
        if (self.plan.config.cluster.num_workers or 1) == 1:
            self.driver.metrics.update(info)

    def warn(self, message: str) -> None:
        self.driver.warn(message)

    def epoch(self, row: EpochMetrics, checkpoint: tune.Checkpoint | None = None) -> None:
        """Report an epoch, with a checkpoint that Tune may pass to other trials."""
        accuracy = row["val_accuracy"]
        metrics = row | {
            "epoch": self.total_epoch(row),
            "epochs": self._num_epochs(),
            # An earlier phase trains a classifier of plain images, which does not rate the protection.
            "final_phase_accuracy": accuracy if row["phase"] == self.phases[-1].name else 0.0,
            "finished": False,
        }
        self._report(metrics, accuracy, search.WORST_LEAKAGE, checkpoint)

    def total_epoch(self, row: EpochMetrics) -> int:
        """Number of epochs of all phases."""
        return epochs_before(self.phases, row["phase"]) + int(row["epoch"])

    def should_stop(self) -> bool:
        return self.driver.should_stop()

    def end(self, record: TrialRecord, bundle: Storage) -> None:
        """Report the result, with the bundle as the final checkpoint.

        ``done`` keeps the scheduler from changing the trial. Only this report has ``accuracy``, so that Tune's best
        result by accuracy or leakage is a trial with a bundle.
        """
        done = record["status"] == "done"
        accuracy = record["accuracy"] if done else 0.0
        leakage = record["leakage"] if done else search.WORST_LEAKAGE
        epochs = record.get("epochs", self._num_epochs())
        metrics = {
            "epoch": epochs + 1, "epochs": epochs, "final_phase_accuracy": accuracy, "accuracy": accuracy,
            "leakage": leakage, "reidentification_rate": record.get("reidentification_rate", 1.0),
            "finished": True, "done": True,
        }  # fmt: skip
        checkpoint = tune.Checkpoint(bundle.uri) if done else None
        if done and bundle.local:  # a search that was killed may have shared them
            separate_files(bundle.path)
        with _private_files():
            self._report(metrics, accuracy, leakage, checkpoint)

    def _num_epochs(self) -> int:
        return sum(phase.epochs for phase in self.phases)

    def _report(self, metrics: dict[str, Any], accuracy: float, leakage: float, checkpoint: Any = None) -> None:
        objectives = pareto.objectives(accuracy, leakage, self.plan.search, self.min_accuracy)
        tune.report(metrics | objectives, checkpoint=checkpoint)


@contextmanager
def _private_files() -> Iterator[None]:
    """Hide new files from other users: Tune copies a bundle's key and classifier, but not the modes of their files."""
    umask = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(umask)


class PopulationReporter(Reporter):
    """Reports to a run's folder and to Tune, which passes checkpoints to other trials of a population."""

    listener: TuneListener

    def report(self, history: list[EpochMetrics], name: str, checkpoint: Path | None) -> None:
        interval = self.listener.plan.search.grace_epochs
        if checkpoint is not None and self.listener.total_epoch(history[-1]) % interval == 0:
            self.save(history, name, checkpoint)
            self.listener.epoch(history[-1], tune.Checkpoint.from_directory(checkpoint))
        else:
            super().report(history, name, checkpoint)


def train_trial(
    point: dict[str, Any], *, dumped: dict[str, Any], min_accuracy: float | None, actor: Any, show_ray_logs: bool
) -> None:
    """Train and attack one trial at a point of the search space, which has choices by their labels."""
    os.environ[VERBOSE] = str(int(show_ray_logs))  # as in the driver
    plan = search.restore_search_plan(dumped)
    name = tune.get_context().get_trial_id()
    cluster = plan.config.cluster
    workers = cluster.num_workers or 1
    torch.set_num_threads(max(1, int(cluster.cpus_per_worker)))
    enable_split_cache()  # for later trials in this process
    driver = RemoteProgress(actor, name)
    listener = TuneListener(plan, min_accuracy, driver)
    decoded = {key: decode_parameters(plan.search.space[key], value) for key, value in point.items()}
    is_population = plan.search.scheduler == "pbt"
    shared = tune.get_checkpoint() if is_population else None  # of this or another trial of the population
    if shared is not None:
        _clear_trial_folder(plan, name, decoded)

    def train(run: Run, display: ProgressListener) -> dict[str, Any]:
        listener.phases = phases(run.config)
        if workers > 1:
            return train_on_ray(_without_restarts(run), display)
        if shared is not None:  # the run's own checkpoints come first: they are at least as new
            with shared.as_directory() as folder:
                run.storage.upload(Path(folder), f"{CHECKPOINTS}/{checkpoint_name(0)}", last="checkpoint.json")
        reporter = (PopulationReporter if is_population else Reporter)(run.storage, listener)
        return finalize_run(run, fit(run.config, reporter, run.phi, run.key), reporter.device)

    leak = search_trial.proxy_leakage if workers == 1 else _remote_leakage
    try:
        record = search_trial.run_trial(plan, name, decoded, listener, train, leak)
    except TrainingInterrupted:
        driver.report(STOPPED)
        # Tune would not resume a trial that returns (finished) or raises (failed). This one ends with the driver.
        threading.Event().wait()
    listener.end(record, plan.storage.folder(f"{search.TRIALS}/{name}/bundle"))


def _without_restarts(run: Run) -> Run:
    """A run whose failures Tune handles: it starts the trial again, which resumes.

    Ray Train's controller outlives a trial that Tune stops by some seconds. In that time it would replace the workers,
    which have ended too, and reserve resources that nothing frees.
    """
    cluster = run.config.cluster.model_copy(update={"max_failures": 0})
    return dataclasses.replace(run, config=run.config.model_copy(update={"cluster": cluster}))


def _clear_trial_folder(plan: SearchPlan, name: str, point: dict[str, Any]) -> None:
    """Delete the trial's earlier run if population based training has changed its settings."""
    trials = plan.storage.folder(search.TRIALS)
    if trials.folder(name).exists("config.yaml"):
        stored = read_checked(trials.folder(name), "config.yaml", "train")
        if stored["train"] != plan.config_at(point).model_dump(mode="json")["train"]:
            trials.delete(name)


def _remote_leakage(bundle: str, config: Config, search: Search, folder: Storage, _: ProgressListener) -> TrialRecord:
    """Run the quick attack as a task, since a trial of several workers has no CPU itself."""
    cluster, uri = config.cluster, folder.uri

    def leakage() -> TrialRecord:
        torch.set_num_threads(max(1, int(cluster.cpus_per_worker)))
        return search_trial.proxy_leakage(bundle, config, search, Storage(uri), ProgressListener())

    task = ray.remote(
        num_cpus=cluster.cpus_per_worker,
        num_gpus=int(uses_gpu(cluster, ray.cluster_resources())),
        max_retries=cluster.max_failures,
        scheduling_strategy="DEFAULT",  # not in the trial's placement group, which has no CPU
    )(leakage)
    record: TrialRecord = ray.get(task.remote())
    return record


def decode_parameters(values: Range | tuple[Any, ...], value: Any) -> Any:
    """The value of a setting in Tune's representation: a number, or the label of a choice."""
    if isinstance(values, Range):
        return int(value) if values.whole else float(value)
    return next(choice for choice in values if plots.label(choice) == value)
