"""Display and records of a search in its driver."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import ray
from ray.tune import Callback
from ray.tune.experiment import Trial

from raypp.cluster.progress_actor import drain, shutdown_grace_period
from raypp.cluster.trial import STOPPED, decode_parameters
from raypp.experiments import plots, search_records, search_results, search_settings
from raypp.experiments.search_records import TrialRecord
from raypp.experiments.search_settings import SearchPlan
from raypp.utils.errors import RayppError
from raypp.utils.progress import MultiProgressDisplay

DRIVER_RECORDS = "ended.json"  # of trials without a result


class TrialMonitor:
    """Shows and records Tune's trials.

    Attributes:
        records: by trial, also of trials that have not ended.
    """

    def __init__(self, plan: SearchPlan, min_accuracy: float | None, display: MultiProgressDisplay, actor: Any) -> None:
        self.plan, self.min_accuracy, self.display, self.actor = plan, min_accuracy, display, actor
        self.records: dict[str, TrialRecord] = {}
        self._stopped: set[str] = set()
        self._deadline: float | None = None  # of running trials, after a stop request

    def check_stop(self, trials: list[Any]) -> None:
        """After a stop request, raise TrainingInterrupted once all running trials have stopped or time is up."""
        if not self.display.stop.is_set():
            return
        if self._deadline is None:
            self.actor.request_stop.remote()
            self._deadline = time.monotonic() + shutdown_grace_period()
        self._stopped |= {trial for trial, kind, _ in drain(self.actor)[1] if kind == STOPPED}
        running = {trial.trial_id for trial in trials if trial.status == Trial.RUNNING}
        if running <= self._stopped or time.monotonic() > self._deadline:
            self.display.raise_if_stop_requested()

    def update(self, trial: Any, result: dict[str, Any]) -> None:
        """Process a report of a trial."""
        epoch, epochs = result.get("epoch", 0), result.get("epochs", 0)
        record = self._record(trial)
        record |= {"accuracy": result.get("accuracy"), "epochs": epoch, "of": epochs}
        if not result.get("finished"):
            info = {
                "phase": "trial", "epoch": epoch, "epochs": epochs, "steps_done": epoch, "steps_total": epochs + 1,
                "images_per_s": result.get("images_per_s", 0.0), "loss": result.get("val_loss", 0.0),
                "accuracy": record["accuracy"],
            }  # fmt: skip
            self.display.step(trial.trial_id, info)

    def finish(self, trial: Any, error: str | None) -> None:
        """Process the end of a trial."""
        name = trial.trial_id
        folder = self.plan.storage.folder(f"{search_settings.TRIALS}/{name}")
        record = self._record(trial)
        if error is not None:
            record |= {"status": "failed", "explanation": error}
        elif folder.exists(search_settings.RESULT):
            record |= search_records.read_record(folder)
        else:
            explanation = f"after {record['epochs']} of {record.get('of', 0)} epochs"
            record |= {"status": "stopped early", "explanation": explanation}
        settings = "  ".join(f"{key.rpartition('.')[2]} {_short(value)}" for key, value in record["settings"].items())
        self.display.done(name, f"{_describe(record)}  ({settings})")
        save_records(self.plan, self.records)
        search_results.write_table(self.plan.storage, all_records(self.plan), self.min_accuracy)

    def finish_search(self) -> None:
        """Record trials that the end of the search has stopped."""
        for name, record in self.records.items():
            result = f"{search_settings.TRIALS}/{name}/{search_settings.RESULT}"
            if "status" not in record and not self.plan.storage.exists(result):
                explanation = f"the search ended after {record['epochs']} of its epochs"
                record |= {"status": "stopped early", "explanation": explanation}
        save_records(self.plan, self.records)

    def _record(self, trial: Any) -> TrialRecord:
        space = self.plan.search.space
        settings = {key: decode_parameters(space[key], value) for key, value in trial.config.items() if key in space}
        record = self.records.setdefault(trial.trial_id, {"epochs": 0})
        record["settings"] = settings
        return record


def _describe(record: TrialRecord) -> str:
    if record["status"] == "done":
        return (
            f"accuracy {record['accuracy']:.1%}, leakage {record['leakage']:.3f}, "
            f"re-identification rate {record['reidentification_rate']:.1%}"
        )
    text = f"{record['status']}: {record['explanation']}"
    if record["status"] == "stopped early" and record.get("accuracy"):
        text += f", accuracy {record['accuracy']:.1%}"
    return text


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(plots.label(value))


def save_records(plan: SearchPlan, records: dict[str, TrialRecord]) -> None:
    """Store the records of trials without a result, so that a resumed search has them."""
    ended = {name: record for name, record in records.items() if record.get("status") in ("stopped early", "failed")}
    earlier = {name: record for name, record in load_records(plan).items() if name not in records}
    plan.storage.write(DRIVER_RECORDS, (json.dumps(earlier | ended, indent=2) + "\n").encode())


def load_records(plan: SearchPlan) -> dict[str, TrialRecord]:
    if not plan.storage.exists(DRIVER_RECORDS):
        return {}
    records: dict[str, TrialRecord] = json.loads(plan.storage.read(DRIVER_RECORDS))
    return records


def all_records(plan: SearchPlan) -> list[TrialRecord]:
    """Records of all trials that have ended, with or without a result."""
    done = {record["trial"]: record for record in search_records.trial_records(plan)}
    others = {name: {"trial": name, **record} for name, record in load_records(plan).items() if name not in done}
    return [*done.values(), *others.values()]


class TuneProgress(Callback):  # type: ignore[misc]
    """Forwards Tune's callbacks to the monitor of this process, also after Tune has restored a stored callback."""

    current: ClassVar[TrialMonitor]

    def __init__(self, monitor: TrialMonitor) -> None:
        type(self).current = monitor

    def on_step_begin(self, iteration: int, trials: list[Any], **_: Any) -> None:
        # Runs about ten times a second in the main thread; an exception ends the search like an interrupt.
        self.current.check_stop(trials)

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        self.current.update(trial, result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self.current.finish(trial, None)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self.current.finish(trial, _reason(trial.get_pickled_error() or trial.get_error()))


def _reason(error: BaseException | None) -> str:
    """Why a trial failed. Ray has no error for a worker that died while its trial started."""
    if error is None:
        return "its worker died while it started"
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        return "it ran out of memory and was ended by Ray"
    if isinstance(error, ray.exceptions.RayActorError):
        return "its worker died too often"
    cause = getattr(error, "cause", None) or error
    words = " ".join(str(cause).split())
    return words if isinstance(cause, RayppError) else f"{type(cause).__name__}: {words[-300:]}"


@contextmanager
def silence_tune() -> Iterator[None]:
    """Silence Tune's own tables."""
    loggers = [logging.getLogger(name) for name in ("ray.tune", "ray.train", "ray.air")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
