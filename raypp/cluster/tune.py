"""Hyperparameter searches on Ray Tune, by Optuna's samplers and Tune's schedulers.

A trial of one worker trains inside its Tune actor. A trial of several workers takes no CPU and waits for a Ray Train
run. Tune then starts only as many trials as there is room for with their workers, which prevents a deadlock.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray import tune
from ray.tune import CheckpointConfig, FailureConfig, ResultGrid, RunConfig, TuneConfig, Tuner
from ray.tune.logger import JsonLoggerCallback

from raypp.cluster import ray_logs
from raypp.cluster.attack import run_on_ray
from raypp.cluster.ray_internals import HEAD
from raypp.cluster.search_algorithms import PatienceStopper, build_param_space, build_sampler, build_scheduler
from raypp.cluster.search_progress import TrialMonitor, all_records, silence_tune
from raypp.cluster.session import may_grow, ray_session, resource_warning, uses_gpu
from raypp.cluster.tasks import Outcome, run_tasks
from raypp.cluster.trial import train_trial
from raypp.experiments import attack_plan, attack_run, pareto, search, search_results
from raypp.experiments.search import SearchPlan, TrialRecord
from raypp.experiments.tracking import TrackedTrials, check_trackers
from raypp.utils.errors import RayppError
from raypp.utils.progress import MultiProgressDisplay
from raypp.utils.signals import stop_on_signal
from raypp.utils.storage import Storage

os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the old output has a quiet mode
# Tune would treat an interrupt as the end of the search and skip the remaining trials.
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
EXPERIMENT = "tune"  # Tune's folder below the search's
SHORT_SEARCH = 50  # trials of a search whose snapshots take little of a second
# A trial of a population may copy a checkpoint that is a few intervals old, see ray-project/ray#9036 and #8441.
NUM_CHECKPOINTS = 4


def run_search(
    plan: SearchPlan, *, resume: bool = False, track: Sequence[str] = (), quiet: bool = False
) -> dict[str, Any]:
    """Run or resume a search, and export its best bundles; returns its summary.

    Args:
        track: names of trackers that receive each trial's settings and metrics.

    Raises:
        RayppError: the search or its folder is not allowed, no trial fits into the cluster, or no trial succeeds.
        TrainingInterrupted: by SIGTERM, after checkpoints or the grace period.
    """
    check_trackers(track)
    with search.open_search(plan, resume=resume) as begun, ray_session() as resources:
        required = _resources_per_trial(plan, resources)
        max_concurrent = _max_concurrent_trials(plan, required, resources, MultiProgressDisplay(0, quiet=quiet))
        plain_accuracy = _train_baseline(plan, quiet) if plan.search.margin is not None else None
        min_accuracy = search_results.min_accuracy(plan.search, plain_accuracy)
        if not plan.storage.exists(search.SUMMARY):
            display = MultiProgressDisplay(plan.search.num_trials, quiet=quiet, what="trials")
            with display, stop_on_signal(display.stop, signal.SIGTERM):
                trackers = TrackedTrials(track, plan, display.warn)
                monitor = TrialMonitor(plan, min_accuracy, display, trackers, required)
                _run_trials(monitor, required, max_concurrent, begun)
        records = all_records(plan)
        _check_success(records, min_accuracy)

        def attack(bundle: str, suite: str, trial: str) -> dict[str, Any]:
            storage = plan.storage.folder("attacks").uri
            gpu = plan.config.cluster.gpu
            flags = [] if gpu is None else ["--cluster.gpu", str(gpu).lower()]
            attack_suite = attack_plan.make_attack_plan(
                bundle=bundle, suite=suite, flags=flags, storage=storage, name=trial
            )
            resume = attack_suite.storage.exists(attack_plan.SUITE)
            # On two cores, a process for each attack costs more time than it saves.
            is_local = not may_grow() and resources.get("CPU", 0) <= 2
            run = None if is_local else run_on_ray
            return attack_run.run_attack_suite(attack_suite, resume=resume, quiet=quiet, run=run)

        return search_results.export_best(plan, records, min_accuracy, attack)


def _check_success(records: list[TrialRecord], min_accuracy: float | None) -> None:
    accuracies = [record["accuracy"] for record in records if record["status"] == "done"]
    if not accuracies:
        reasons = {record["explanation"] for record in records if record["explanation"]}
        raise RayppError(f"no trial reached its end; {'; '.join(sorted(reasons)[:3]) or 'see trials.csv'}")
    if not pareto.pareto(records, min_accuracy):
        raise RayppError(
            f"no trial reached search.min_accuracy, which is {min_accuracy:.1%}; the best has {max(accuracies):.1%}"
        )


def _resources_per_trial(plan: SearchPlan, resources: dict[str, float]) -> dict[str, float]:
    """CPUs and GPUs of a trial, with all its workers."""
    cluster, num_workers = plan.config.cluster, plan.config.cluster.num_workers or 1
    required = {"CPU": cluster.cpus_per_worker * num_workers}
    if uses_gpu(cluster, resources):
        required["GPU"] = num_workers if num_workers > 1 else plan.search.gpus_per_trial
    return required


def _max_concurrent_trials(
    plan: SearchPlan, required: dict[str, float], resources: dict[str, float], display: MultiProgressDisplay
) -> int:
    """Number of parallel trials: ``search.max_concurrent``, or as many as the cluster has room for.

    Raises:
        ConfigError: no trial fits into a cluster that cannot grow.
    """
    places = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if (plan.config.cluster.num_workers or 1) > 1:  # the workers of a trial may run on several nodes
        places = [resources]
    room = sum(min(int(place.get(kind, 0) / amount) for kind, amount in required.items()) for place in places)
    if room < 1:
        needs = " and ".join(f"{amount:g} {kind}s" for kind, amount in required.items())
        available = " and ".join(f"{resources.get(kind, 0):g}" for kind in required)
        keys = "cluster.num_workers, cluster.cpus_per_worker and search.gpus_per_trial"
        display.warn("cluster", resource_warning(f"a trial needs {needs}, the cluster has {available}", keys))
    return plan.search.max_concurrent or max(1, room)


def _train_baseline(plan: SearchPlan, quiet: bool) -> float:
    """Validation accuracy of a classifier of plain images."""
    outcome: Outcome = {}
    with MultiProgressDisplay(1, quiet=quiet, what="baseline") as display:

        def on_done(name: str, result: Outcome) -> None:
            outcome.update(result)
            display.done(name, f"{result['result']:.1%}" if "result" in result else f"failed: {result['error']}")

        work = {search_results.BASELINE: (plan.dump(),)}
        run_tasks(
            search_results.train_baseline,
            work,
            plan.config.cluster,
            plan.storage,
            display,
            on_done,
            what="the baseline",
        )
    if "error" in outcome:
        raise RayppError(f"the baseline of search.min_accuracy failed: {outcome['error']}")
    return float(outcome["result"])


def _run_trials(monitor: TrialMonitor, required: dict[str, float], max_concurrent: int, begun: bool) -> None:
    plan = monitor.plan
    if (plan.config.cluster.num_workers or 1) > 1:
        # Tune does not accept 0 CPUs. The Ray Train run of a distributed trial reserves its own.
        required = {HEAD: 0.01}
    parameters = {
        "dumped": plan.dump(), "min_accuracy": monitor.min_accuracy, "actor": monitor.actor,
        "show_ray_logs": ray_logs.are_shown(),
    }  # fmt: skip
    trial = tune.with_resources(tune.with_parameters(train_trial, **parameters), required)
    folder = plan.storage.folder(EXPERIMENT).uri
    with silence_tune(), _tune_settings(plan):
        if begun and Tuner.can_restore(folder):
            tuner = Tuner.restore(folder, trainable=trial, resume_unfinished=True, resume_errored=True)
        else:
            tuner = _build_tuner(monitor, trial, max_concurrent)
        try:
            tuner.fit()
        finally:
            monitor.trackers.close()
    monitor.finish_search()


def _build_tuner(monitor: TrialMonitor, trial: Any, max_concurrent: int) -> Tuner:
    plan, settings, cluster = monitor.plan, monitor.plan.search, monitor.plan.config.cluster
    is_population = settings.scheduler == "pbt"
    patience = settings.patience
    stopper = PatienceStopper(patience, settings.objective, monitor.min_accuracy) if patience else None
    return Tuner(
        trial,
        param_space=build_param_space(settings) if is_population else {},
        tune_config=TuneConfig(
            num_samples=settings.num_trials,
            # A population that exceeds the cluster takes turns.
            max_concurrent_trials=None if is_population else max_concurrent,
            reuse_actors=(cluster.num_workers or 1) == 1 and not is_population,
            search_alg=build_sampler(settings, plan.config.seed),
            scheduler=build_scheduler(plan),
            time_budget_s=60 * settings.max_minutes if settings.max_minutes is not None else None,
        ),
        run_config=RunConfig(
            name=EXPERIMENT,
            storage_path=plan.storage.uri,
            verbose=0,
            stop=stopper,
            callbacks=[monitor, JsonLoggerCallback()],  # Tune reads its results from JSON
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=NUM_CHECKPOINTS),
        ),
    )


def snapshot_seconds(storage: Storage, num_trials: int) -> str:
    """Seconds between Tune's snapshots of a search.

    After a crash of the driver, Tune samples trials again that no snapshot contains. A snapshot holds all trials and
    goes to the storage. Ray's ``auto`` spends at most 5% of the time on it, and at least 10 s lie between two.
    """
    return "1" if storage.local and num_trials <= SHORT_SEARCH else "auto"


@contextmanager
def _tune_settings(plan: SearchPlan) -> Iterator[None]:
    """Variables that Tune reads when a search starts; those of the user have priority."""
    settings = {
        "TUNE_GLOBAL_CHECKPOINT_S": snapshot_seconds(plan.storage, plan.search.num_trials),
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # event files come from --track tensorboard
    }
    missing = {key: value for key, value in settings.items() if key not in os.environ}
    os.environ |= missing
    try:
        yield
    finally:
        for key in missing:
            os.environ.pop(key, None)


def load_result_grid(folder: str) -> ResultGrid:
    """Ray Tune's results of the search in ``folder``, without running anything."""
    return Tuner.restore(Storage(folder).folder(EXPERIMENT).uri, trainable=train_trial).get_results()
