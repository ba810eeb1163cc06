"""Display and records of a search in its driver."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import ray
from ray.tune import Callback

from raypp.cluster import ray_logs
from raypp.cluster.progress_actor import Event, EventPoll, create_progress_actor, shutdown_grace_period
from raypp.cluster.ray_internals import has_ended, is_running, skip_second_checkpoint, trial_error
from raypp.cluster.shared_files import remove_unlisted_files, share_files
from raypp.cluster.trial import STOPPED, decode_parameters
from raypp.cluster.waiting import ResourceNotice, Resources
from raypp.experiments import plots, search, search_results
from raypp.experiments.run_folder import read_checked
from raypp.experiments.search import RESULT, TRIALS, SearchPlan, TrialRecord
from raypp.experiments.tracking import TrackedTrials
from raypp.utils.documents import dump_json
from raypp.utils.errors import RayppError
from raypp.utils.progress import MultiProgressDisplay

DRIVER_RECORDS = "ended.json"  # of trials without a result
RELAY_SECONDS = 0.5
END_SECONDS = 5.0  # for the last events, after the end of the trials


class TrialMonitor(Callback):  # type: ignore[misc]  # Ray has no types here
    """Shows and records Tune's trials.

    Args:
        trackers: receive each trial's settings and metrics.
        required: resources of a trial, with all its workers.

    Attributes:
        actor: the progress actor of all trials.
        records: by trial, also of trials that have not ended.
    """

    current: ClassVar[TrialMonitor | None] = None

    def __init__(
        self,
        plan: SearchPlan,
        min_accuracy: float | None,
        display: MultiProgressDisplay,
        trackers: TrackedTrials,
        required: Resources,
    ) -> None:
        self.plan, self.min_accuracy, self.display, self.trackers = plan, min_accuracy, display, trackers
        self.actor = create_progress_actor()
        self._trials: list[Any] = []
        seconds, warn = plan.config.cluster.notice_seconds, display.of("cluster").warn
        self._notice = ResourceNotice("a trial", required, seconds, self._all_wait, warn)
        self._events = EventPoll(self.actor, RELAY_SECONDS)
        self.records: dict[str, TrialRecord] = {}
        self._stopped: set[str] = set()
        self._deadline: float | None = None  # of running trials, after a stop request
        TrialMonitor.current = self

    def __reduce__(self) -> tuple[Any, ...]:
        """Tune stores its callbacks; it restores the monitor of this process, or none where results are only read."""
        return _current_monitor, ()

    def on_step_begin(self, *, trials: list[Any], **_: Any) -> None:
        """After a stop request, raise TrainingInterrupted once all running trials have stopped or time is up.

        Tune calls it about ten times a second in the main thread; an exception ends the search like an interrupt.
        """
        self._trials = trials
        self._notice.check()
        self._show(self._events.take())
        if not self.display.stop.is_set():
            return
        if self._deadline is None:
            self.actor.request_stop.remote()
            self._deadline = time.monotonic() + shutdown_grace_period()
        running = {trial.trial_id for trial in trials if is_running(trial)}
        if running <= self._stopped or time.monotonic() > self._deadline:
            self.display.raise_if_stop_requested()

    def _all_wait(self) -> bool:
        running = any(is_running(trial) for trial in self._trials)
        return not running and not all(has_ended(trial) for trial in self._trials)

    def _show(self, events: list[Event]) -> None:
        """Show the warnings of trials, and record those that have stopped."""
        for trial, kind, value in events:
            if kind == STOPPED:
                self._stopped.add(trial)
            elif kind == "warn":
                self.display.warn(trial, value)

    def on_trial_result(self, *, trial: Any, result: dict[str, Any], **_: Any) -> None:
        epoch, epochs = result.get("epoch", 0), result.get("epochs", 0)
        accuracy = result.get("accuracy", result.get("val_accuracy"))
        record = self._record(trial)
        record |= {"accuracy": accuracy, "epochs": epoch, "of": epochs}
        self.trackers.log(trial.trial_id, record["settings"], result)
        skip_second_checkpoint(trial, result)
        if not result.get("finished"):
            info = {
                "phase": "trial", "epoch": epoch, "epochs": epochs, "steps_done": epoch, "steps_total": epochs + 1,
                "images_per_s": result.get("images_per_s", 0.0), "loss": result.get("val_loss", 0.0),
                "accuracy": accuracy,
            }  # fmt: skip
            self.display.step(trial.trial_id, info)

    def on_checkpoint(self, *, trial: Any, checkpoint: Any, **_: Any) -> None:
        """Complete a finished trial's final checkpoint, its bundle, and free the disk space of one of the two."""
        remove_unlisted_files(checkpoint)
        bundle = self.plan.storage.folder(f"{TRIALS}/{trial.trial_id}/bundle")
        if bundle.local:
            share_files(bundle.path, Path(checkpoint.path))

    def on_trial_error(self, *, trial: Any, **_: Any) -> None:
        self.on_trial_complete(trial=trial, error=_reason(trial_error(trial)))

    def on_trial_complete(self, *, trial: Any, error: str | None = None, **_: Any) -> None:
        name, record = trial.trial_id, self._record(trial)
        folder = self.plan.storage.folder(f"{TRIALS}/{name}")
        if error is not None:
            record |= {"status": "failed", "explanation": error}
        elif folder.exists(RESULT):
            record |= search.read_record(folder)
        else:
            explanation = f"after {record['epochs']} of {record.get('of', 0)} epochs"
            record |= {"status": "stopped early", "explanation": explanation}
        settings = "  ".join(f"{key.rpartition('.')[2]} {_short(value)}" for key, value in record["settings"].items())
        self.display.done(name, f"{_describe(record)}  ({settings})")
        self.trackers.finish(name, succeeded=error is None)
        self._save_records()
        search_results.write_table(self.plan.storage, all_records(self.plan), self.min_accuracy)

    def finish_search(self) -> None:
        """Show the last warnings, and record trials that the end of the search has stopped."""
        self._show(self._events.take_last(END_SECONDS))
        for name, record in self.records.items():
            if "status" not in record and not self.plan.storage.exists(f"{TRIALS}/{name}/{RESULT}"):
                explanation = f"the search ended after {record['epochs']} of its epochs"
                record |= {"status": "stopped early", "explanation": explanation}
        self._save_records()

    def _record(self, trial: Any) -> TrialRecord:
        space = self.plan.search.space
        settings = {key: decode_parameters(space[key], value) for key, value in trial.config.items() if key in space}
        record = self.records.setdefault(trial.trial_id, {"epochs": 0})
        record["settings"] = settings
        return record

    def _save_records(self) -> None:
        """Store the records of trials without a result, so that a resumed search has them."""
        records = {name: record for name, record in load_records(self.plan).items() if name not in self.records}
        for name, record in self.records.items():
            if record.get("status") in ("stopped early", "failed"):
                records[name] = record
        self.plan.storage.write(DRIVER_RECORDS, dump_json(records))


def _current_monitor() -> Callback:
    return TrialMonitor.current or Callback()


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


def load_records(plan: SearchPlan) -> dict[str, TrialRecord]:
    return read_checked(plan.storage, DRIVER_RECORDS) if plan.storage.exists(DRIVER_RECORDS) else {}


def all_records(plan: SearchPlan) -> list[TrialRecord]:
    """Records of all trials that have ended, with or without a result."""
    done = {record["trial"]: record for record in search.trial_records(plan)}
    others = {name: {"trial": name, **record} for name, record in load_records(plan).items() if name not in done}
    return [*done.values(), *others.values()]


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
    """Silence Tune's loggers, unless Ray's log lines are shown."""
    if ray_logs.are_shown():
        yield
        return
    levels = {logger: logger.level for logger in map(logging.getLogger, ("ray.tune", "ray.train", "ray.air"))}
    for logger in levels:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
