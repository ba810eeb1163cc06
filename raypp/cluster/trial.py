"""A trial of Ray Tune."""

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

OF_TUNE = "of-tune"  # a checkpoint that Tune hands to a trial, among its run's own
STOPPED = "stopped"  # what a trial pins to the board once it has stopped, as told
HEAD = "node:__internal_head__"


class TuneReporter(LocalReporter):
    """Reports to a run's folder and to Tune; with ``carry`` Tune gets every checkpoint, to hand it to other trials."""

    def __init__(self, run: Storage, display: TuneListener, carry: bool) -> None:
        super().__init__(run, display)
        self._reports, self._carry = display, carry
        self._given = tune.get_checkpoint() if carry else None

    def checkpoints(self) -> list[str]:
        given = [OF_TUNE] if self._given is not None else []
        return [*super().checkpoints(), *given]  # its own, where it has some, are of the same settings and no older

    @contextmanager
    def open(self, name: str) -> Iterator[Path]:
        if name == OF_TUNE:
            assert self._given is not None
            with self._given.as_directory() as folder:
                yield Path(folder)
            return
        with super().open(name) as folder:
            yield folder

    def report(self, history: list[EpochMetrics], name: str, checkpoint: Path | None) -> None:
        if self._carry and checkpoint is not None:
            self._reports.checkpoint = tune.Checkpoint.from_directory(checkpoint)
        super().report(history, name, checkpoint)
        self._reports.checkpoint = None  # its folder goes with the epoch


class TuneListener(search_trial.NullListener):
    """Shows a trial's training to Tune, a report per epoch, and stops it when the board says so."""

    def __init__(self, plan: SearchPlan, least: float | None, board: Any) -> None:
        self.plan, self.least, self.board = plan, least, board
        self.checkpoint: Any = None
        self.phases: list[Phase] = []

    def begin(self, run: Run) -> None:
        """A run begins or goes on; its configuration is settled, so that its phases are known."""
        self.phases = phases(run.config)

    def epoch(self, row: EpochMetrics) -> None:
        names = [phase.name for phase in self.phases]
        before = sum(phase.epochs for phase in self.phases[: names.index(row["phase"])])
        found = {
            "epoch": before + row["epoch"],
            "epochs": sum(phase.epochs for phase in self.phases),
            "accuracy": row["val_accuracy"],
            # A classifier of plain images, where one comes first, says nothing about its protection.
            "judged": row["val_accuracy"] if row["phase"] == names[-1] else 0.0,
            "val_loss": row["val_loss"],
            "images_per_s": row["images_per_s"],
            "finished": False,
        }
        told = pareto.objectives(row["val_accuracy"], search_records.WORST_LEAKAGE, self.plan.search, self.least)
        tune.report(found | told, checkpoint=self.checkpoint)

    def should_stop(self) -> bool:
        return stop_requested(self.board)

    def end(self, record: TrialRecord) -> None:
        """The trial is over; ``done`` keeps the scheduler from redirecting it."""
        done = record["status"] == "done"
        accuracy = record["accuracy"] if done else 0.0
        leakage = record["leakage"] if done else search_records.WORST_LEAKAGE
        total = sum(phase.epochs for phase in self.phases)
        found = {"epoch": total + 1, "epochs": total, "accuracy": accuracy, "judged": accuracy, "leakage": leakage}
        told = pareto.objectives(accuracy, leakage, self.plan.search, self.least)
        tune.report(
            found
            | told
            | {"reidentification_rate": record.get("reidentification_rate", 1.0), "finished": True, "done": True}
        )


def train_trial(point: dict[str, Any], *, dumped: dict[str, Any], least: float | None, board: Any) -> None:
    """What runs in a trial."""
    plan = search_settings.restore_search_plan(dumped)
    name = tune.get_context().get_trial_id()
    cluster = plan.config.cluster
    workers = cluster.num_workers or 1
    torch.set_num_threads(max(1, int(cluster.cpus_per_worker)))
    enable_split_cache()  # the process may train more trials
    reports = TuneListener(plan, least, board)
    carry = plan.search.scheduler == "pbt"
    decoded = {key: decode_parameters(plan.search.space[key], value) for key, value in point.items()}
    if carry and tune.get_checkpoint() is not None:
        _clear_trial_folder(plan, name, decoded)

    def train(run: Run, display: Any) -> dict[str, Any]:
        reports.begin(run)
        if workers > 1:
            return train_on_ray(run, display)
        sink = TuneReporter(run.storage, reports, carry)
        return finalize_run(run, fit(run.config, sink, run.phi, run.key), sink.device)

    leak = search_trial.proxy_leakage if workers == 1 else _leakage_in_a_task
    try:
        record = search_trial.run_trial(plan, name, decoded, reports, train, leak)
    except TrainingInterrupted:
        board.pin.remote(STOPPED, None, name)
        # To Tune a function that returns is a trial at its end, one that raises a failed one; neither would go on
        # when the search is resumed. This one ends with the driver.
        threading.Event().wait()
    reports.end(record)


def _clear_trial_folder(plan: SearchPlan, name: str, point: dict[str, Any]) -> None:
    """Remove what a trial did before it was redirected: with other settings, it is no longer its own."""
    trials = plan.storage.folder(search_settings.TRIALS)
    if trials.folder(name).exists("config.yaml"):
        was = read_checked(trials.folder(name), "config.yaml", "train")
        now = plan.config_at(point).model_dump(mode="json")
        if was["train"] != now["train"]:
            trials.delete(name)


def _leakage_in_a_task(bundle: str, config: Config, asked: Search, folder: Storage, _: Any) -> TrialRecord:
    """The quick attack where the trial itself holds no CPU."""
    cluster = config.cluster
    gpus = 1 if uses_gpu(cluster, ray.cluster_resources()) else 0
    # "DEFAULT" takes it out of the trial's own placement group, which has no CPU.
    elsewhere = {"num_cpus": cluster.cpus_per_worker, "num_gpus": gpus, "scheduling_strategy": "DEFAULT"}
    task = ray.remote(**elsewhere, max_retries=cluster.max_failures)(_leakage)
    arguments = bundle, config.model_dump(mode="json"), asked.model_dump(mode="json"), folder.uri
    found: TrialRecord = ray.get(task.remote(*arguments))
    return found


def _leakage(bundle: str, config: dict[str, Any], asked: dict[str, Any], folder: str) -> TrialRecord:
    settings = validate(config)
    torch.set_num_threads(max(1, int(settings.cluster.cpus_per_worker)))
    return search_trial.proxy_leakage(
        bundle, settings, Search.model_validate(asked), Storage(folder), search_trial.NullListener()
    )


def decode_parameters(values: Range | tuple[Any, ...], value: Any) -> Any:
    """The setting that a label of the space stands for."""
    if isinstance(values, Range):
        return int(value) if values.whole else float(value)
    return next(choice for choice in values if plots.label(choice) == value)
