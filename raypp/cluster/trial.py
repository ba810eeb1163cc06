"""The training function of a Ray Tune trial."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune

from raypp.cluster.progress_actor import stop_requested
from raypp.cluster.session import uses_gpu
from raypp.cluster.train import train_on_ray
from raypp.config.schema import Config
from raypp.config.validation import validate
from raypp.data.splits import enable_split_cache
from raypp.experiments import pareto, plots, search_records, search_settings, search_trial
from raypp.experiments.run_folder import read_checked
from raypp.experiments.search_records import TrialRecord
from raypp.experiments.search_settings import Range, Search, SearchPlan
from raypp.experiments.training_run import Run, finalize_run
from raypp.training.checkpoint import EpochMetrics
from raypp.training.protected_classifier import phases
from raypp.training.protection_task import fit
from raypp.training.reporter import LocalReporter
from raypp.training.task import Phase
from raypp.utils.errors import TrainingInterrupted
from raypp.utils.storage import Storage

TUNE_CHECKPOINT = "of-tune"  # name of the checkpoint that Tune passes to a trial
STOPPED = "stopped"  # event of a trial that has stopped on request
HEAD = "node:__internal_head__"  # Ray's resource of the head node


class TuneReporter(LocalReporter):
    """Reports to a run's folder and to Tune; with ``share_checkpoints``, Tune passes checkpoints to other trials."""

    def __init__(self, run: Storage, listener: TuneListener, share_checkpoints: bool) -> None:
        super().__init__(run, listener)
        self._listener, self._share_checkpoints = listener, share_checkpoints
        self._tune_checkpoint = tune.get_checkpoint() if share_checkpoints else None

    def checkpoints(self) -> list[str]:
        names = super().checkpoints()  # come first: they have the same settings and are at least as new
        return names if self._tune_checkpoint is None else [*names, TUNE_CHECKPOINT]

    @contextmanager
    def open(self, name: str) -> Iterator[Path]:
        if name == TUNE_CHECKPOINT:
            assert self._tune_checkpoint is not None
            with self._tune_checkpoint.as_directory() as folder:
                yield Path(folder)
            return
        with super().open(name) as folder:
            yield folder

    def report(self, history: list[EpochMetrics], name: str, checkpoint: Path | None) -> None:
        if self._share_checkpoints and checkpoint is not None:
            self._listener.checkpoint = tune.Checkpoint.from_directory(checkpoint)
        super().report(history, name, checkpoint)
        self._listener.checkpoint = None  # the trainer deletes its folder


class TuneListener(search_trial.NullListener):
    """Reports each epoch of a trial to Tune, and stops the trial on request."""

    def __init__(self, plan: SearchPlan, min_accuracy: float | None, actor: Any) -> None:
        self.plan, self.min_accuracy, self.actor = plan, min_accuracy, actor
        self.checkpoint: Any = None
        self.phases: list[Phase] = []  # set once the configuration of the run is known

    def epoch(self, row: EpochMetrics) -> None:
        names = [phase.name for phase in self.phases]
        earlier = sum(phase.epochs for phase in self.phases[: names.index(row["phase"])])
        metrics = {
            "epoch": earlier + row["epoch"],
            "epochs": sum(phase.epochs for phase in self.phases),
            "accuracy": row["val_accuracy"],
            # An earlier phase trains a classifier of plain images, which does not rate the protection.
            "final_phase_accuracy": row["val_accuracy"] if row["phase"] == names[-1] else 0.0,
            "val_loss": row["val_loss"],
            "images_per_s": row["images_per_s"],
            "finished": False,
        }
        objectives = self._objectives(row["val_accuracy"], search_records.WORST_LEAKAGE)
        tune.report(metrics | objectives, checkpoint=self.checkpoint)

    def should_stop(self) -> bool:
        return stop_requested(self.actor)

    def end(self, record: TrialRecord) -> None:
        """Report the result; ``done`` keeps the scheduler from changing the trial."""
        done = record["status"] == "done"
        accuracy = record["accuracy"] if done else 0.0
        leakage = record["leakage"] if done else search_records.WORST_LEAKAGE
        total = sum(phase.epochs for phase in self.phases)
        metrics = {
            "epoch": total + 1, "epochs": total, "accuracy": accuracy, "final_phase_accuracy": accuracy,
            "leakage": leakage, "reidentification_rate": record.get("reidentification_rate", 1.0),
            "finished": True, "done": True,
        }  # fmt: skip
        tune.report(metrics | self._objectives(accuracy, leakage))

    def _objectives(self, accuracy: float, leakage: float) -> dict[str, float]:
        return pareto.objectives(accuracy, leakage, self.plan.search, self.min_accuracy)


def train_trial(point: dict[str, Any], *, dumped: dict[str, Any], min_accuracy: float | None, actor: Any) -> None:
    """Train and attack one trial at a point of the search space, which has choices by their labels."""
    plan = search_settings.restore_search_plan(dumped)
    name = tune.get_context().get_trial_id()
    cluster = plan.config.cluster
    workers = cluster.num_workers or 1
    torch.set_num_threads(max(1, int(cluster.cpus_per_worker)))
    enable_split_cache()  # for later trials in this process
    listener = TuneListener(plan, min_accuracy, actor)
    is_population = plan.search.scheduler == "pbt"
    decoded = {key: decode_parameters(plan.search.space[key], value) for key, value in point.items()}
    if is_population and tune.get_checkpoint() is not None:
        _clear_trial_folder(plan, name, decoded)

    def train(run: Run, display: Any) -> dict[str, Any]:
        listener.phases = phases(run.config)
        if workers > 1:
            return train_on_ray(run, display)
        reporter = TuneReporter(run.storage, listener, is_population)
        return finalize_run(run, fit(run.config, reporter, run.phi, run.key), reporter.device)

    leak = search_trial.proxy_leakage if workers == 1 else _remote_leakage
    try:
        record = search_trial.run_trial(plan, name, decoded, listener, train, leak)
    except TrainingInterrupted:
        actor.report.remote(STOPPED, None, name)
        # Tune would not resume a trial that returns (finished) or raises (failed). This one ends with the driver.
        threading.Event().wait()
    listener.end(record)


def _clear_trial_folder(plan: SearchPlan, name: str, point: dict[str, Any]) -> None:
    """Delete the trial's earlier run if population based training has changed its settings."""
    trials = plan.storage.folder(search_settings.TRIALS)
    if trials.folder(name).exists("config.yaml"):
        stored = read_checked(trials.folder(name), "config.yaml", "train")
        if stored["train"] != plan.config_at(point).model_dump(mode="json")["train"]:
            trials.delete(name)


def _remote_leakage(bundle: str, config: Config, search: Search, folder: Storage, _: Any) -> TrialRecord:
    """Run the quick attack as a task, since a trial of several workers has no CPU itself."""
    cluster = config.cluster
    gpus = 1 if uses_gpu(cluster, ray.cluster_resources()) else 0
    task = ray.remote(
        num_cpus=cluster.cpus_per_worker,
        num_gpus=gpus,
        max_retries=cluster.max_failures,
        scheduling_strategy="DEFAULT",  # not in the trial's placement group, which has no CPU
    )(_leakage)
    arguments = bundle, config.model_dump(mode="json"), search.model_dump(mode="json"), folder.uri
    record: TrialRecord = ray.get(task.remote(*arguments))
    return record


def _leakage(bundle: str, config: dict[str, Any], search: dict[str, Any], folder: str) -> TrialRecord:
    settings = validate(config)
    torch.set_num_threads(max(1, int(settings.cluster.cpus_per_worker)))
    return search_trial.proxy_leakage(
        bundle, settings, Search.model_validate(search), Storage(folder), search_trial.NullListener()
    )


def decode_parameters(values: Range | tuple[Any, ...], value: Any) -> Any:
    """The value of a setting in Tune's representation: a number, or the label of a choice."""
    if isinstance(values, Range):
        return int(value) if values.whole else float(value)
    return next(choice for choice in values if plots.label(choice) == value)
