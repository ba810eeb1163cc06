"""Progress and records of a search in its driver."""

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


class TrialMonitor:
    """What the driver shows and writes while trials run: a row of each that Tune knows."""

    def __init__(self, plan: SearchPlan, least: float | None, display: MultiProgressDisplay, board: Any) -> None:
        self.plan, self.least, self.display, self.board = plan, least, display, board
        self.rows: dict[str, TrialRecord] = {}
        self._stopped: set[str] = set()
        self._until: float | None = None  # when to give up trials that were told to stop

    def look(self, trials: list[Any]) -> None:
        """Raise ToldToStop once the display was told to stop and the trials that run have, or time is up."""
        if not self.display.stop.is_set():
            return
        if self._until is None:
            self.board.stop.remote()
            self._until = time.monotonic() + shutdown_grace_period()
        self._stopped |= {trial for trial, kind, _ in drain(self.board)[1] if kind == STOPPED}
        running = {trial.trial_id for trial in trials if trial.status == Trial.RUNNING}
        if running <= self._stopped or time.monotonic() > self._until:
            self.display.raise_if_stop_requested()

    def result(self, trial: Any, result: dict[str, Any]) -> None:
        row = self.rows.setdefault(trial.trial_id, {"epochs": 0})
        row |= {"accuracy": result.get("accuracy"), "epochs": result.get("epoch", 0), "settings": self._settings(trial)}
        row["of"] = result.get("epochs", 0)
        if not result.get("finished"):
            info = {
                "phase": "trial", "epoch": row["epochs"], "epochs": row["of"], "steps_done": row["epochs"],
                "steps_total": row["of"] + 1, "images_per_s": result.get("images_per_s", 0.0),
                "loss": result.get("val_loss", 0.0), "accuracy": row["accuracy"],
            }  # fmt: skip
            self.display.step(trial.trial_id, info)

    def ended(self, trial: Any, error: str | None) -> None:
        name = trial.trial_id
        folder = self.plan.storage.folder(f"{search_settings.TRIALS}/{name}")
        row = self.rows.setdefault(name, {"epochs": 0, "settings": self._settings(trial)})
        if error is not None:
            row |= {"status": "failed", "explanation": error}
            said = f"failed: {error}"
        elif folder.exists(search_settings.RESULT):
            record = search_records.read_record(folder)
            row |= record
            said = _said(record)
        else:
            row |= {"status": "stopped early", "explanation": f"after {row['epochs']} of {row.get('of', 0)} epochs"}
            accuracy = row.get("accuracy")
            said = f"stopped early after {row['epochs']} epochs" + (f", accuracy {accuracy:.1%}" if accuracy else "")
        settings = "  ".join(f"{key.rpartition('.')[2]} {_short(value)}" for key, value in row["settings"].items())
        self.display.done(name, f"{said}  ({settings})")
        save_records(self.plan, self.rows)
        search_results.write_table(self.plan.storage, all_records(self.plan), self.least)

    def over(self) -> None:
        """The search has ended; what still ran then, its time or patience stopped."""
        for name, row in self.rows.items():
            if "status" not in row and not self.plan.storage.exists(
                f"{search_settings.TRIALS}/{name}/{search_settings.RESULT}"
            ):
                row |= {
                    "status": "stopped early",
                    "explanation": f"the search ended after {row['epochs']} of its epochs",
                }
        save_records(self.plan, self.rows)

    def _settings(self, trial: Any) -> dict[str, Any]:
        space = self.plan.search.space
        return {key: decode_parameters(space[key], value) for key, value in trial.config.items() if key in space}


def _said(record: TrialRecord) -> str:
    if record["status"] != "done":
        return f"{record['status']}: {record['explanation']}"
    return f"accuracy {record['accuracy']:.1%}, leakage {record['leakage']:.3f}, {record['reidentification_rate']:.1%} found"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(plots.label(value))


def save_records(plan: SearchPlan, rows: dict[str, TrialRecord]) -> None:
    """Keep what only the driver knows of trials that did not reach their end, so that a resumed search still does."""
    before = load_records(plan)
    now = {name: row for name, row in rows.items() if row.get("status") in ("stopped early", "failed")}
    resumed = {name: row for name, row in before.items() if name not in rows}
    plan.storage.write(ENDED, (json.dumps(resumed | now, indent=2) + "\n").encode())


def load_records(plan: SearchPlan) -> dict[str, TrialRecord]:
    if not plan.storage.exists(ENDED):
        return {}
    found: dict[str, TrialRecord] = json.loads(plan.storage.read(ENDED))
    return found


def all_records(plan: SearchPlan) -> list[TrialRecord]:
    """Records of all trials that have ended, however they did."""
    done = {record["trial"]: record for record in search_records.trial_records(plan)}
    others = {name: {"trial": name, **row} for name, row in load_records(plan).items() if name not in done}
    return [*done.values(), *others.values()]


class TuneProgress(Callback):  # type: ignore[misc]
    """Tells the watch of this process what Tune tells. Tune stores its callbacks: what is restored finds it again."""

    current: ClassVar[TrialMonitor | None] = None

    def __init__(self, watch: TrialMonitor) -> None:
        type(self).current = watch

    def on_step_begin(self, iteration: int, trials: list[Any], **_: Any) -> None:
        # Some ten times a second, and in the main thread: what is raised here ends the search like an interrupt.
        if self.current is not None:
            self.current.look(trials)

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        if self.current is not None:
            self.current.result(trial, result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        if self.current is not None:
            self.current.ended(trial, None)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        if self.current is not None:
            self.current.ended(trial, _reason(trial.get_pickled_error() or trial.get_error()))


def _reason(error: BaseException | None) -> str:
    """Why a trial failed, in a sentence. Ray gives no error for a worker that died while its trial started."""
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
    """Keep Tune's own tables off the screen: the display shows the trials."""
    loggers = [logging.getLogger(name) for name in ("ray.tune", "ray.train", "ray.air")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


ENDED = "ended.json"  # what only the driver knows of trials
