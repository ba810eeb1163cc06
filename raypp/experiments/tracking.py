"""Runs and trials in experiment trackers: settings at the start, metrics after each epoch, results at the end.

A tracker that fails within a run is left out from then on; the run continues.
"""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from raypp.config.overrides import flatten_dict
from raypp.config.schema import Config
from raypp.experiments.run_folder import read_history
from raypp.experiments.search import TRIALS, Point, SearchPlan
from raypp.experiments.trackers import TRACKERS, Tracker
from raypp.experiments.training_run import Run
from raypp.training.checkpoint import EpochMetrics
from raypp.training.protected_classifier import phases
from raypp.training.task import Phase
from raypp.utils.documents import dump_json
from raypp.utils.errors import ConfigError, RayppError, first_line
from raypp.utils.progress import ProgressListener, Row
from raypp.utils.storage import Storage

TRACKING = "tracking"  # a search's folder of trackers, by trial
IDENTIFIERS = "tracking.json"  # of a run in its trackers
TRACKED = ("lr", "images_per_s")  # metrics of an epoch, next to those of the training and the validation images


def check_trackers(names: Iterable[str]) -> None:
    """Raise ConfigError for a tracker that does not exist, or that lacks its package."""
    for name in names:
        package = TRACKERS.get(name).package
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"--track {name} needs the package {package}, which is not installed: uv sync --extra {name}"
            )


def epochs_before(run_phases: Sequence[Phase], name: str) -> int:
    """Epochs of all phases before the phase ``name``."""
    names = [phase.name for phase in run_phases]
    return sum(phase.epochs for phase in run_phases[: names.index(name)])


class Tracking:
    """The trackers of one run.

    Args:
        names: of trackers, which :func:`check_trackers` has checked.
        folder: for files of the trackers.
        run: the run's name.
        group: the search of a trial; None for a run outside a search.
        warn: receives a sentence about a tracker that fails within the run.

    Raises:
        RayppError: a tracker refuses the run, for example because its server does not respond.
    """

    def __init__(
        self, names: Sequence[str], folder: Storage, run: str, group: str | None, config: Config,
        warn: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._warn = warn
        self._trackers: dict[str, Tracker] = {}
        settings = flatten_dict(config.model_dump(mode="json"))
        identifiers = json.loads(folder.read(IDENTIFIERS)) if folder.exists(IDENTIFIERS) else {}
        for name in dict.fromkeys(names):
            try:
                self._trackers[name] = TRACKERS.get(name)(folder, run, group, settings, identifiers.get(name))
            except Exception as error:  # of any kind: each client has its own
                self.finish(succeeded=False)
                raise RayppError(f"--track {name}: {first_line(error)}") from error
        started = {name: tracker.run_id for name, tracker in self._trackers.items() if tracker.run_id is not None}
        if started.items() - identifiers.items():
            folder.write(IDENTIFIERS, dump_json(identifiers | started))

    def log_epoch(self, row: Mapping[str, Any], epoch: int) -> None:
        """Record the metrics of an epoch, by ``PHASE/METRIC``; losses of different phases do not compare.

        Args:
            row: of ``metrics.jsonl``; other entries are left out.
            epoch: number of epochs of all phases.
        """
        metrics = {
            f"{row['phase']}/{key}": float(value)
            for key, value in row.items()
            if key.startswith(("train_", "val_")) or key in TRACKED
        }
        self._call(lambda tracker: tracker.log(metrics, epoch))

    def log_results(self, results: Mapping[str, float], epoch: int) -> None:
        """Record results of the whole run, such as the test accuracy."""
        self._call(lambda tracker: tracker.log(results, epoch))

    def finish(self, *, succeeded: bool) -> None:
        self._call(lambda tracker: tracker.finish(succeeded=succeeded))
        self._trackers = {}

    def _call(self, function: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                function(tracker)
            except Exception as error:  # of any kind: each client has its own
                del self._trackers[name]
                self._warn(f"--track {name}: {first_line(error)}; the run continues without this tracker")


class TrackedRun(ProgressListener):
    """Forwards the progress of a run to a display, and its epochs to trackers."""

    def __init__(self, display: ProgressListener, tracking: Tracking, run_phases: Sequence[Phase]) -> None:
        self._display, self._tracking, self._phases = display, tracking, run_phases

    def note(self, message: str) -> None:
        self._display.note(message)

    def step(self, info: Row) -> None:
        self._display.step(info)

    def warn(self, message: str) -> None:
        self._display.warn(message)

    def should_stop(self) -> bool:
        return self._display.should_stop()

    def epoch(self, row: EpochMetrics) -> None:
        self._display.epoch(row)
        self._tracking.log_epoch(row, epochs_before(self._phases, row["phase"]) + row["epoch"])

    def results(self, summary: Mapping[str, Any]) -> None:
        """Record the numbers of a finished run's protected test images."""
        numbers = {f"test/{key}": value for key, value in summary["test"].items() if isinstance(value, int | float)}
        self._tracking.log_results(numbers, sum(summary["epochs"].values()))


@contextmanager
def track_run(names: Sequence[str], run: Run, name: str, display: ProgressListener) -> Iterator[TrackedRun]:
    """Track a run while the context lasts; an error or an interrupt marks it as failed."""
    tracking = Tracking(names, run.storage, name, None, run.config, display.warn)
    try:
        yield TrackedRun(display, tracking, phases(run.config))
    except BaseException:
        tracking.finish(succeeded=False)
        raise
    tracking.finish(succeeded=True)


class TrackedTrials:
    """The trackers of a search's trials, in the process that runs the search.

    Args:
        names: of trackers, which :func:`check_trackers` has checked.
        warn: receives a trial and a sentence about a tracker that fails.
    """

    def __init__(self, names: Sequence[str], plan: SearchPlan, warn: Callable[[str, str], None]) -> None:
        self._names, self._plan, self._warn = names, plan, warn
        self._active: dict[str, Tracking] = {}

    def log(self, trial: str, point: Point, result: Mapping[str, Any]) -> None:
        """Record what a trial reports: the metrics of an epoch, or at its end accuracy and leakage."""
        tracking = self._active.get(trial) or self._open(trial, point, result["epoch"])
        if tracking is None:
            return
        if result["finished"]:
            scores = {key: float(result[key]) for key in ("accuracy", "leakage", "reidentification_rate")}
            tracking.log_results(scores, result["epochs"])
        else:
            tracking.log_epoch(result, result["epoch"])

    def finish(self, trial: str, *, succeeded: bool) -> None:
        """End a trial; one that a scheduler has stopped has succeeded."""
        if trial in self._active:
            self._active.pop(trial).finish(succeeded=succeeded)

    def close(self) -> None:
        """End trials that have not ended, since the search has."""
        for trial in list(self._active):
            self.finish(trial, succeeded=False)

    def _open(self, trial: str, point: Point, epoch: int) -> Tracking | None:
        """Trackers of a trial whose first report here is about ``epoch``; None without, or for contradicting settings.

        Earlier epochs come from the trial's folder: a process that was killed may not have recorded them, and a value
        that it has recorded is the same.
        """
        if not self._names:
            return None
        search = self._plan.storage
        name, folder = search.uri.rstrip("/").rpartition("/")[2], search.folder(f"{TRACKING}/{trial}")
        try:
            config, warn = self._plan.config_at(point), functools.partial(self._warn, trial)
            tracking = self._active[trial] = Tracking(self._names, folder, trial, name, config, warn)
            for row in read_history(search.folder(f"{TRIALS}/{trial}")):
                row_epoch = epochs_before(phases(config), row["phase"]) + row["epoch"]
                if row_epoch < epoch:
                    tracking.log_epoch(row, row_epoch)
        except ConfigError:
            return None
        except RayppError as error:
            self._warn(trial, f"{error}; the search continues without trackers")
            self._names = ()
        return self._active.get(trial)
