"""Hyperparameter searches on Ray Tune, by Optuna's samplers and Tune's schedulers.

A trial of one worker trains inside its Tune actor. A trial of several workers takes no CPU and waits for a Ray Train
run. Tune then starts only as many trials as there is room for with their workers, which prevents a deadlock.
"""

from __future__ import annotations

import importlib.util
import os
import signal
from typing import Any

import ray
from ray import tune
from ray.tune import Callback, FailureConfig, RunConfig, TuneConfig, Tuner

from raypp.cluster import ray_logs
from raypp.cluster.attack import run_on_ray
from raypp.cluster.search_algorithms import PatienceStopper, build_param_space, build_sampler, build_scheduler
from raypp.cluster.search_progress import TrialMonitor, all_records, silence_tune
from raypp.cluster.session import may_grow, ray_session, resource_warning, uses_gpu
from raypp.cluster.tasks import Outcome, run_tasks
from raypp.cluster.trial import HEAD, train_trial
from raypp.experiments import attack_plan, attack_run, pareto, search, search_results
from raypp.experiments.search import SearchPlan, TrialRecord
from raypp.utils.errors import RayppError
from raypp.utils.progress import MultiProgressDisplay
from raypp.utils.signals import stop_on_signal

os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the old output has a quiet mode
# Tune would treat an interrupt as the end of the search and skip the remaining trials.
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
# Seconds between snapshots. After a crash of the driver, Tune samples trials again that no snapshot contains.
os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "1")
EXPERIMENT = "tune"  # Tune's folder below the search's


def run_search(plan: SearchPlan, *, resume: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Run or resume a search, and export its best bundles; returns its summary.

    Raises:
        RayppError: the search or its folder is not allowed, no trial fits into the cluster, or no trial succeeds.
        TrainingInterrupted: by SIGTERM, after checkpoints or the grace period.
    """
    with search.open_search(plan, resume=resume) as begun, ray_session() as resources:
        required = _resources_per_trial(plan, resources)
        max_concurrent = _max_concurrent_trials(plan, required, resources, MultiProgressDisplay(0, quiet=quiet))
        plain_accuracy = _train_baseline(plan, quiet) if plan.search.margin is not None else None
        min_accuracy = search_results.min_accuracy(plan.search, plain_accuracy)
        if not plan.storage.exists(search.SUMMARY):
            display = MultiProgressDisplay(plan.search.num_trials, quiet=quiet, what="trials")
            with display, stop_on_signal(display.stop, signal.SIGTERM):
                _run_trials(TrialMonitor(plan, min_accuracy, display, required), required, max_concurrent, begun)
        records = all_records(plan)
        _check_success(records, min_accuracy)

        def attack(bundle: str, suite: str, trial: str) -> dict[str, Any]:
            storage = plan.storage.folder("attacks").uri
            attack_suite = attack_plan.make_attack_plan(bundle=bundle, suite=suite, storage=storage, name=trial)
            resume = attack_suite.storage.exists(attack_plan.SUITE)
            # On two cores, a process for each attack costs more time than it saves.
            is_local = not may_grow() and resources.get("CPU", 0) <= 2
            run = attack_run.run_attacks_locally if is_local else run_on_ray
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
        run_tasks(search_results.train_baseline, work, plan.config.cluster, display, on_done, what="the baseline")
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
    with silence_tune():
        if begun and Tuner.can_restore(folder):
            tuner = Tuner.restore(folder, trainable=trial, resume_unfinished=True, resume_errored=True)
        else:
            tuner = _build_tuner(monitor, trial, max_concurrent)
        tuner.fit()
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
            callbacks=[monitor, *_loggers(plan.storage.uri)],
            failure_config=FailureConfig(max_failures=cluster.max_failures),
        ),
    )


def _loggers(folder: str) -> list[Callback]:
    """MLflow's callback if MLflow is installed and configured. Tune adds TensorBoard's by default."""
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri or importlib.util.find_spec("mlflow") is None:
        return []
    from ray.air.integrations.mlflow import MLflowLoggerCallback

    return [MLflowLoggerCallback(tracking_uri=uri, experiment_name=folder.rstrip("/").rpartition("/")[2])]
