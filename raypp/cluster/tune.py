"""Searches on Ray Tune: trials side by side, each a run of its own, by Optuna's samplers and Tune's schedulers.

A trial of one worker trains inside its Tune actor. One of several workers is a Ray Train run that the trial's function
waits for: it then takes no CPU itself, and only as many run as their workers have room for, so that none of them waits
for what another waiting one holds.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import ray
import torch
from ray import tune
from ray.tune import Callback, FailureConfig, RunConfig, Stopper, TuneConfig, Tuner
from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, MedianStoppingRule, PopulationBasedTraining, TrialScheduler
from ray.tune.search.optuna import OptunaSearch

from raypp.cluster import attack as attacks
from raypp.cluster.progress_actor import put_up, seconds_to_stop, taken, told_to_stop
from raypp.cluster.session import (
    can_grow,
    lacks,
    session,
    wants_gpu,
)
from raypp.cluster.tasks import spread
from raypp.cluster.train import train_on_ray
from raypp.config import Config, validate
from raypp.data.splits import keep_splits
from raypp.experiments import attack_run, search
from raypp.experiments.search import Plan, Range, Record, Search
from raypp.experiments.training_run import Run, conclude, stored
from raypp.training.protected_classifier import phases
from raypp.training.protection_task import fit
from raypp.training.reporter import LocalSink, Row
from raypp.training.trainer import Phase
from raypp.utils.errors import RayppError, ToldToStop
from raypp.utils.progress import GridDisplay
from raypp.utils.signals import told_by
from raypp.utils.storage import Storage

os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # whose quiet mode prints nothing
# Tune would take an interrupt for the end of the search, and what is left would never run.
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
# Seconds between snapshots: a trial that Tune has not noted is drawn anew after the driver died.
os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "1")
MANY_EPOCHS = 2**31
EXPERIMENT = "tune"  # Tune's own folder below the search's
OF_TUNE = "of-tune"  # a checkpoint that Tune hands to a trial, among its run's own
STOPPED = "stopped"  # what a trial pins to the board once it has stopped, as told
ENDED = "ended.json"  # what only the driver knows of trials
HEAD = "node:__internal_head__"


class TuneSink(LocalSink):
    """Reports to a run's folder and to Tune; with ``carry`` Tune gets every checkpoint, to hand it to other trials."""

    def __init__(self, run: Storage, display: _Reports, carry: bool) -> None:
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

    def report(self, history: list[Row], name: str, checkpoint: Path | None) -> None:
        if self._carry and checkpoint is not None:
            self._reports.checkpoint = tune.Checkpoint.from_directory(checkpoint)
        super().report(history, name, checkpoint)
        self._reports.checkpoint = None  # its folder goes with the epoch


class _Reports(search.Silent):
    """Shows a trial's training to Tune, a report per epoch, and stops it when the board says so."""

    def __init__(self, plan: Plan, least: float | None, board: Any) -> None:
        self.plan, self.least, self.board = plan, least, board
        self.checkpoint: Any = None
        self.phases: list[Phase] = []

    def begin(self, run: Run) -> None:
        """A run begins or goes on; its configuration is settled, so that its phases are known."""
        self.phases = phases(run.config)

    def epoch(self, row: Row) -> None:
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
        told = search.objectives(row["val_accuracy"], search.WORST_LEAKAGE, self.plan.search, self.least)
        tune.report(found | told, checkpoint=self.checkpoint)

    def told_to_stop(self) -> bool:
        return told_to_stop(self.board)

    def end(self, record: Record) -> None:
        """The trial is over; ``done`` keeps the scheduler from redirecting it."""
        done = record["status"] == "done"
        accuracy = record["accuracy"] if done else 0.0
        leakage = record["leakage"] if done else search.WORST_LEAKAGE
        total = sum(phase.epochs for phase in self.phases)
        found = {"epoch": total + 1, "epochs": total, "accuracy": accuracy, "judged": accuracy, "leakage": leakage}
        told = search.objectives(accuracy, leakage, self.plan.search, self.least)
        tune.report(found | told | {"found": record.get("found", 1.0), "finished": True, "done": True})


def _trial(point: dict[str, Any], *, dumped: dict[str, Any], least: float | None, board: Any) -> None:
    """What runs in a trial."""
    plan = search.restore(dumped)
    name = tune.get_context().get_trial_id()
    cluster = plan.config.cluster
    workers = cluster.num_workers or 1
    torch.set_num_threads(max(1, int(cluster.cpus_per_worker)))
    keep_splits()  # the process may train more trials
    reports = _Reports(plan, least, board)
    carry = plan.search.scheduler == "pbt"
    decoded = {key: _decoded(plan.search.space[key], value) for key, value in point.items()}
    if carry and tune.get_checkpoint() is not None:
        _make_way(plan, name, decoded)

    def train(run: Run, display: Any) -> dict[str, Any]:
        reports.begin(run)
        if workers > 1:
            return train_on_ray(run, display)
        sink = TuneSink(run.storage, reports, carry)
        return conclude(run, fit(run.config, sink, run.phi, run.key), sink.device)

    leak = search.quick_leakage if workers == 1 else _leakage_in_a_task
    try:
        record = search.run_trial(plan, name, decoded, reports, train, leak)
    except ToldToStop:
        board.pin.remote(STOPPED, None, name)
        # To Tune a function that returns is a trial at its end, one that raises a failed one; neither would go on
        # when the search is resumed. This one ends with the driver.
        threading.Event().wait()
    reports.end(record)


def _make_way(plan: Plan, name: str, point: dict[str, Any]) -> None:
    """Remove what a trial did before it was redirected: with other settings, it is no longer its own."""
    trials = plan.storage.folder(search.TRIALS)
    if trials.folder(name).exists("config.yaml"):
        was = stored(trials.folder(name), "config.yaml", "train")
        now = plan.config_at(point).model_dump(mode="json")
        if was["train"] != now["train"]:
            trials.delete(name)


def _leakage_in_a_task(bundle: str, config: Config, asked: Search, folder: Storage, _: Any) -> Record:
    """The quick attack where the trial itself holds no CPU."""
    cluster = config.cluster
    gpus = 1 if wants_gpu(cluster, ray.cluster_resources()) else 0
    # "DEFAULT" takes it out of the trial's own placement group, which has no CPU.
    elsewhere = {"num_cpus": cluster.cpus_per_worker, "num_gpus": gpus, "scheduling_strategy": "DEFAULT"}
    task = ray.remote(**elsewhere, max_retries=cluster.max_failures)(_leakage)
    arguments = bundle, config.model_dump(mode="json"), asked.model_dump(mode="json"), folder.uri
    found: Record = ray.get(task.remote(*arguments))
    return found


def _leakage(bundle: str, config: dict[str, Any], asked: dict[str, Any], folder: str) -> Record:
    settings = validate(config)
    torch.set_num_threads(max(1, int(settings.cluster.cpus_per_worker)))
    return search.quick_leakage(bundle, settings, Search.model_validate(asked), Storage(folder), search.Silent())


def _decoded(values: Range | tuple[Any, ...], value: Any) -> Any:
    """The setting that a label of the space stands for."""
    if isinstance(values, Range):
        return int(value) if values.whole else float(value)
    return next(choice for choice in values if search.label(choice) == value)


def run_search(plan: Plan, *, resume: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Run a search to its end, from where it was stopped, and hand over its best bundles; returns its summary.

    Raises:
        RayppError: the search or its folder is not allowed, no trial fits into the cluster, or none was finished.
        ToldToStop: by SIGTERM, when what was under way has written checkpoints or taken too long.
    """
    with search.open_search(plan, resume=resume) as begun, session() as have:
        room = _room(plan, have, GridDisplay(0, quiet=quiet).warn)
        plain = _baseline(plan, quiet) if plan.search.margin is not None else None
        least = search.least_accuracy(plan.search, plain)
        if not plan.storage.exists(search.SUMMARY):
            display = GridDisplay(plan.search.num_trials, quiet=quiet, what="trials")
            with display, told_by(display.stop, signal.SIGTERM):
                _tune(plan, have, room, least, _Watch(plan, least, display, put_up()), begun)
        records = _all_records(plan)
        if not any(record["status"] == "done" for record in records):
            reasons = {record["explanation"] for record in records if record["explanation"]}
            raise RayppError(f"no trial reached its end; {'; '.join(sorted(reasons)[:3]) or 'see trials.csv'}")
        if not search.pareto(records, least):
            best = max(r["accuracy"] for r in records if r["status"] == "done")
            raise RayppError(
                f"no trial reached the accuracy {least:.1%} that search.min_accuracy asks for; the best has {best:.1%}"
            )

        def attacked(bundle: str, suite: str, trial: str) -> dict[str, Any]:
            folder = plan.storage.folder("attacks")
            made = attack_run.make_plan(bundle=bundle, suite=suite, storage=folder.uri, name=trial)
            # On two cores a process for each attack costs more than it gains.
            alone = not can_grow() and have.get("CPU", 0) <= 2
            run = attack_run.run_locally if alone else attacks.run_on_ray
            return attack_run.attack(made, resume=made.storage.exists(attack_run.SUITE), quiet=quiet, run=run)

        return search.hand_over(plan, records, least, attacked)


def _room(plan: Plan, have: dict[str, float], warn: Callable[[str, str], None]) -> int:
    """How many trials run at once: as asked, else as many as the cluster has room for; raises ConfigError for none."""
    cluster, workers = plan.config.cluster, plan.config.cluster.num_workers or 1
    needs = {"CPU": cluster.cpus_per_worker * workers}
    if wants_gpu(cluster, have):
        needs["GPU"] = workers if workers > 1 else plan.search.gpus_per_trial
    # The workers of one trial may lie on several nodes, one worker may not.
    places = [have] if workers > 1 else [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = sum(min(int(place.get(kind, 0) / each) for kind, each in needs.items()) for place in places)
    if room < 1:
        asked = " and ".join(f"{each:g} {kind}s" for kind, each in needs.items())
        there = " and ".join(f"{have.get(kind, 0):g}" for kind in needs)
        see = "cluster.num_workers, cluster.cpus_per_worker and search.gpus_per_trial"
        warn("cluster", lacks(f"a trial needs {asked}, the cluster has {there}", see))
    return plan.search.max_concurrent or max(1, room)


def _baseline(plan: Plan, quiet: bool) -> float:
    """Validation accuracy of a classifier of plain images."""
    found: dict[str, Any] = {}
    with GridDisplay(1, quiet=quiet, what="baseline") as display:

        def ended(name: str, outcome: dict[str, Any]) -> None:
            found.update(outcome)
            display.done(name, f"{outcome['result']:.1%}" if "result" in outcome else f"failed: {outcome['error']}")

        work = {search.BASELINE: (plan.dump(),)}
        spread(search.train_baseline, work, plan.config.cluster, display, ended, what="the baseline")
    if "error" in found:
        raise RayppError(f"the baseline of search.min_accuracy failed: {found['error']}")
    accuracy: float = found["result"]
    return accuracy


def _tune(plan: Plan, have: dict[str, float], room: int, least: float | None, watch: _Watch, begun: bool) -> None:
    asked, cluster = plan.search, plan.config.cluster
    workers = cluster.num_workers or 1
    if workers > 1:
        needs: dict[str, float] = {HEAD: 0.01}  # Tune refuses 0 CPUs; the run inside asks for its own
    else:
        needs = {"CPU": cluster.cpus_per_worker}
        if wants_gpu(cluster, have):
            needs["GPU"] = asked.gpus_per_trial
    parameters = {"dumped": plan.dump(), "least": least, "board": watch.board}
    trial = tune.with_resources(tune.with_parameters(_trial, **parameters), needs)
    follow = _Follow(watch)
    folder = plan.storage.folder(EXPERIMENT)
    with _silent():
        if begun and Tuner.can_restore(folder.uri):
            tuner = Tuner.restore(folder.uri, trainable=trial, resume_unfinished=True, resume_errored=True)
        else:
            patience = asked.patience
            stop = NoImprovement(patience, asked.objective, least) if patience is not None else None
            tuner = Tuner(
                trial,
                param_space=_param_space(asked) if asked.scheduler == "pbt" else {},
                tune_config=TuneConfig(
                    num_samples=asked.num_trials,
                    # A population takes turns where there is no room for all of it at once.
                    max_concurrent_trials=None if asked.scheduler == "pbt" else room,
                    reuse_actors=workers == 1 and asked.scheduler != "pbt",
                    search_alg=_sampler(asked, plan.config.seed),
                    scheduler=_scheduler(plan),
                    time_budget_s=60 * asked.max_minutes if asked.max_minutes is not None else None,
                ),
                run_config=RunConfig(
                    name=EXPERIMENT,
                    storage_path=plan.storage.uri,
                    verbose=0,
                    stop=stop,
                    callbacks=[follow, *_loggers(plan)],
                    failure_config=FailureConfig(max_failures=cluster.max_failures),
                ),
            )
        tuner.fit()
    watch.over()


def _sampler(asked: Search, seed: int) -> Any:
    """Optuna behind Tune's interface; population based training draws its own points."""
    import optuna

    if asked.scheduler == "pbt":
        return None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    samplers = optuna.samplers
    kinds: dict[str, Callable[[], Any]] = {
        # The first third at random: with Optuna's own ten, a short search would hardly be one.
        "tpe": lambda: samplers.TPESampler(
            seed=seed, n_startup_trials=max(4, min(10, asked.num_trials // 3)), multivariate=True, constant_liar=True
        ),
        "nsga2": lambda: samplers.NSGAIISampler(seed=seed, population_size=max(4, min(50, asked.num_trials // 4))),
        "random": lambda: samplers.RandomSampler(seed=seed),
    }
    space = {key: search.distribution(values) for key, values in asked.space.items()}
    if asked.objective == "both":
        metric: Any = ["told_accuracy", "told_leakage"]
        mode: Any = ["max", "min"]
    else:
        metric, mode = "told_score", "max"
    return OptunaSearch(space, metric=metric, mode=mode, sampler=kinds[asked.sampler]())


def _param_space(asked: Search) -> dict[str, Any]:
    def domain(values: Range | tuple[Any, ...]) -> Any:
        if isinstance(values, tuple):
            return tune.choice([search.label(value) for value in values])
        return (tune.loguniform if values.log else tune.uniform)(values.low, values.high)

    return {key: domain(values) for key, values in asked.space.items()}


def _scheduler(plan: Plan) -> Any:
    asked = plan.search
    common: dict[str, Any] = {"time_attr": "epoch", "metric": "judged", "mode": "max"}
    if asked.scheduler == "asha":
        # Trials end by themselves; what ends at max_t would not be attacked.
        return AsyncHyperBandScheduler(**common, max_t=MANY_EPOCHS, grace_period=asked.grace_epochs, reduction_factor=2)
    if asked.scheduler == "median":
        return MedianStoppingRule(**common, grace_period=asked.grace_epochs, min_samples_required=3)
    if asked.scheduler == "pbt":
        return _Population(
            **common,
            perturbation_interval=asked.grace_epochs,
            hyperparam_mutations=_param_space(asked),
            custom_explore_fn=functools.partial(_within, asked.model_dump(mode="json")),
        )
    return None


class _Population(PopulationBasedTraining):  # type: ignore[misc]  # Ray has no types here
    """Takes no turn after a trial's last epoch: who took over such a network would train no more."""

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> Any:
        if result["epoch"] >= result["epochs"]:
            return TrialScheduler.CONTINUE
        return super().on_trial_result(controller, trial, result)


def _within(asked: dict[str, Any], point: dict[str, Any]) -> dict[str, Any]:
    """A perturbed point, brought back into the space's ranges."""
    space = Search.model_validate(asked).space
    limits = {key: values for key, values in space.items() if isinstance(values, Range)}
    return {
        key: min(max(value, limits[key].low), limits[key].high) if key in limits else value
        for key, value in point.items()
    }


def _loggers(plan: Plan) -> list[Callback]:
    """MLflow where it is installed and told where to write; TensorBoard is Tune's own default."""
    if importlib.util.find_spec("mlflow") is None or not os.environ.get("MLFLOW_TRACKING_URI"):
        return []
    from ray.air.integrations.mlflow import MLflowLoggerCallback

    experiment = plan.storage.uri.rstrip("/").rpartition("/")[2]
    return [MLflowLoggerCallback(tracking_uri=os.environ["MLFLOW_TRACKING_URI"], experiment_name=experiment)]


class NoImprovement(Stopper):  # type: ignore[misc]  # Ray has no types here
    """Ends a search after so many finished trials in a row that improved neither front nor objective."""

    def __init__(self, patience: int, objective: str, least: float | None) -> None:
        self._patience, self._objective, self._least = patience, objective, least
        self._records: list[Record] = []
        self._best, self._since = -math.inf, 0

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        if result.get("finished"):
            done = {"trial": trial_id, "status": "done", "accuracy": result["accuracy"], "leakage": result["leakage"]}
            self._records.append(done)
            if self._objective == "both":
                value = search.hypervolume(self._records, self._least)
            else:
                value = result["told_score"]
            self._since = 0 if value > self._best else self._since + 1
            self._best = max(self._best, value)
        return False

    def stop_all(self) -> bool:
        return self._since >= self._patience


class _Watch:
    """What the driver shows and writes while trials run: a row of each that Tune knows."""

    def __init__(self, plan: Plan, least: float | None, display: GridDisplay, board: Any) -> None:
        self.plan, self.least, self.display, self.board = plan, least, display, board
        self.rows: dict[str, Record] = {}
        self._stopped: set[str] = set()
        self._until: float | None = None  # when to give up trials that were told to stop

    def look(self, trials: list[Any]) -> None:
        """Raise ToldToStop once the display was told to stop and the trials that run have, or time is up."""
        if not self.display.stop.is_set():
            return
        if self._until is None:
            self.board.stop.remote()
            self._until = time.monotonic() + seconds_to_stop()
        self._stopped |= {trial for trial, kind, _ in taken(self.board)[1] if kind == STOPPED}
        running = {trial.trial_id for trial in trials if trial.status == Trial.RUNNING}
        if running <= self._stopped or time.monotonic() > self._until:
            self.display.end_if_told()

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
        folder = self.plan.storage.folder(f"{search.TRIALS}/{name}")
        row = self.rows.setdefault(name, {"epochs": 0, "settings": self._settings(trial)})
        if error is not None:
            row |= {"status": "failed", "explanation": error}
            said = f"failed: {error}"
        elif folder.exists(search.RESULT):
            record = search.read_record(folder)
            row |= record
            said = _said(record)
        else:
            row |= {"status": "stopped early", "explanation": f"after {row['epochs']} of {row.get('of', 0)} epochs"}
            accuracy = row.get("accuracy")
            said = f"stopped early after {row['epochs']} epochs" + (f", accuracy {accuracy:.1%}" if accuracy else "")
        settings = "  ".join(f"{key.rpartition('.')[2]} {_short(value)}" for key, value in row["settings"].items())
        self.display.done(name, f"{said}  ({settings})")
        _keep(self.plan, self.rows)
        search.write_table(self.plan.storage, _all_records(self.plan), self.least)

    def over(self) -> None:
        """The search has ended; what still ran then, its time or patience stopped."""
        for name, row in self.rows.items():
            if "status" not in row and not self.plan.storage.exists(f"{search.TRIALS}/{name}/{search.RESULT}"):
                row |= {
                    "status": "stopped early",
                    "explanation": f"the search ended after {row['epochs']} of its epochs",
                }
        _keep(self.plan, self.rows)

    def _settings(self, trial: Any) -> dict[str, Any]:
        space = self.plan.search.space
        return {key: _decoded(space[key], value) for key, value in trial.config.items() if key in space}


def _said(record: Record) -> str:
    if record["status"] != "done":
        return f"{record['status']}: {record['explanation']}"
    return f"accuracy {record['accuracy']:.1%}, leakage {record['leakage']:.3f}, {record['found']:.1%} found"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(search.label(value))


def _keep(plan: Plan, rows: dict[str, Record]) -> None:
    """Keep what only the driver knows of trials that did not reach their end, so that a resumed search still does."""
    before = _kept(plan)
    now = {name: row for name, row in rows.items() if row.get("status") in ("stopped early", "failed")}
    resumed = {name: row for name, row in before.items() if name not in rows}
    plan.storage.write(ENDED, (json.dumps(resumed | now, indent=2) + "\n").encode())


def _kept(plan: Plan) -> dict[str, Record]:
    if not plan.storage.exists(ENDED):
        return {}
    found: dict[str, Record] = json.loads(plan.storage.read(ENDED))
    return found


def _all_records(plan: Plan) -> list[Record]:
    """Records of all trials that have ended, however they did."""
    done = {record["trial"]: record for record in search.records_of(plan)}
    others = {name: {"trial": name, **row} for name, row in _kept(plan).items() if name not in done}
    return [*done.values(), *others.values()]


class _Follow(Callback):  # type: ignore[misc]
    """Tells the watch of this process what Tune tells. Tune stores its callbacks: what is restored finds it again."""

    current: ClassVar[_Watch | None] = None

    def __init__(self, watch: _Watch) -> None:
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
def _silent() -> Iterator[None]:
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
