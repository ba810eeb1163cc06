"""Searches on Ray Tune: trials side by side, each a run of its own, by Optuna's samplers and Tune's schedulers.

A trial of one worker trains inside its Tune actor. One of several workers is a Ray Train run that the trial's function
waits for: it then takes no CPU itself, and only as many run as their workers have room for, so that none of them waits
for what another waiting one holds.
"""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Callable
from typing import Any

import ray
from ray import tune
from ray.tune import Callback, FailureConfig, RunConfig, TuneConfig, Tuner

from raypp.cluster import attack as attacks
from raypp.cluster.progress_actor import create_progress_actor
from raypp.cluster.search_algorithms import PatienceStopper, build_param_space, build_sampler, build_scheduler
from raypp.cluster.search_progress import TrialMonitor, TuneProgress, all_records, silence_tune
from raypp.cluster.session import insufficient_resources, is_autoscaling, ray_session, uses_gpu
from raypp.cluster.tasks import run_tasks
from raypp.cluster.trial import HEAD, train_trial
from raypp.experiments import attack_plan, attack_run, pareto, search, search_results, search_settings
from raypp.experiments.search_settings import SearchPlan
from raypp.utils.errors import RayppError
from raypp.utils.progress import MultiProgressDisplay
from raypp.utils.signals import stop_on_signal

os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # whose quiet mode prints nothing
# Tune would take an interrupt for the end of the search, and what is left would never run.
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
# Seconds between snapshots: a trial that Tune has not noted is drawn anew after the driver died.
os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "1")
EXPERIMENT = "tune"  # Tune's own folder below the search's


def run_search(plan: SearchPlan, *, resume: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Run a search to its end, from where it was stopped, and hand over its best bundles; returns its summary.

    Raises:
        RayppError: the search or its folder is not allowed, no trial fits into the cluster, or none was finished.
        ToldToStop: by SIGTERM, when what was under way has written checkpoints or taken too long.
    """
    with search.open_search(plan, resume=resume) as begun, ray_session() as have:
        room = _max_concurrent_trials(plan, have, MultiProgressDisplay(0, quiet=quiet).warn)
        plain = _baseline(plan, quiet) if plan.search.margin is not None else None
        least = search_results.min_accuracy(plan.search, plain)
        if not plan.storage.exists(search_settings.SUMMARY):
            display = MultiProgressDisplay(plan.search.num_trials, quiet=quiet, what="trials")
            with display, stop_on_signal(display.stop, signal.SIGTERM):
                _tune(plan, have, room, least, TrialMonitor(plan, least, display, create_progress_actor()), begun)
        records = all_records(plan)
        if not any(record["status"] == "done" for record in records):
            reasons = {record["explanation"] for record in records if record["explanation"]}
            raise RayppError(f"no trial reached its end; {'; '.join(sorted(reasons)[:3]) or 'see trials.csv'}")
        if not pareto.pareto(records, least):
            best = max(r["accuracy"] for r in records if r["status"] == "done")
            raise RayppError(
                f"no trial reached the accuracy {least:.1%} that search.min_accuracy asks for; the best has {best:.1%}"
            )

        def attacked(bundle: str, suite: str, trial: str) -> dict[str, Any]:
            folder = plan.storage.folder("attacks")
            made = attack_plan.make_attack_plan(bundle=bundle, suite=suite, storage=folder.uri, name=trial)
            # On two cores a process for each attack costs more than it gains.
            alone = not is_autoscaling() and have.get("CPU", 0) <= 2
            run = attack_run.run_attacks_locally if alone else attacks.run_on_ray
            return attack_run.run_attack_suite(
                made, resume=made.storage.exists(attack_plan.SUITE), quiet=quiet, run=run
            )

        return search_results.export_best(plan, records, least, attacked)


def _max_concurrent_trials(plan: SearchPlan, have: dict[str, float], warn: Callable[[str, str], None]) -> int:
    """How many trials run at once: as asked, else as many as the cluster has room for; raises ConfigError for none."""
    cluster, workers = plan.config.cluster, plan.config.cluster.num_workers or 1
    needs = {"CPU": cluster.cpus_per_worker * workers}
    if uses_gpu(cluster, have):
        needs["GPU"] = workers if workers > 1 else plan.search.gpus_per_trial
    # The workers of one trial may lie on several nodes, one worker may not.
    places = [have] if workers > 1 else [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = sum(min(int(place.get(kind, 0) / each) for kind, each in needs.items()) for place in places)
    if room < 1:
        asked = " and ".join(f"{each:g} {kind}s" for kind, each in needs.items())
        there = " and ".join(f"{have.get(kind, 0):g}" for kind in needs)
        see = "cluster.num_workers, cluster.cpus_per_worker and search.gpus_per_trial"
        warn("cluster", insufficient_resources(f"a trial needs {asked}, the cluster has {there}", see))
    return plan.search.max_concurrent or max(1, room)


def _baseline(plan: SearchPlan, quiet: bool) -> float:
    """Validation accuracy of a classifier of plain images."""
    found: dict[str, Any] = {}
    with MultiProgressDisplay(1, quiet=quiet, what="baseline") as display:

        def ended(name: str, outcome: dict[str, Any]) -> None:
            found.update(outcome)
            display.done(name, f"{outcome['result']:.1%}" if "result" in outcome else f"failed: {outcome['error']}")

        work = {search_results.BASELINE: (plan.dump(),)}
        run_tasks(search_results.train_baseline, work, plan.config.cluster, display, ended, what="the baseline")
    if "error" in found:
        raise RayppError(f"the baseline of search.min_accuracy failed: {found['error']}")
    accuracy: float = found["result"]
    return accuracy


def _tune(
    plan: SearchPlan, have: dict[str, float], room: int, least: float | None, watch: TrialMonitor, begun: bool
) -> None:
    asked, cluster = plan.search, plan.config.cluster
    workers = cluster.num_workers or 1
    if workers > 1:
        needs: dict[str, float] = {HEAD: 0.01}  # Tune refuses 0 CPUs; the run inside asks for its own
    else:
        needs = {"CPU": cluster.cpus_per_worker}
        if uses_gpu(cluster, have):
            needs["GPU"] = asked.gpus_per_trial
    parameters = {"dumped": plan.dump(), "least": least, "board": watch.board}
    trial = tune.with_resources(tune.with_parameters(train_trial, **parameters), needs)
    follow = TuneProgress(watch)
    folder = plan.storage.folder(EXPERIMENT)
    with silence_tune():
        if begun and Tuner.can_restore(folder.uri):
            tuner = Tuner.restore(folder.uri, trainable=trial, resume_unfinished=True, resume_errored=True)
        else:
            patience = asked.patience
            stop = PatienceStopper(patience, asked.objective, least) if patience is not None else None
            tuner = Tuner(
                trial,
                param_space=build_param_space(asked) if asked.scheduler == "pbt" else {},
                tune_config=TuneConfig(
                    num_samples=asked.num_trials,
                    # A population takes turns where there is no room for all of it at once.
                    max_concurrent_trials=None if asked.scheduler == "pbt" else room,
                    reuse_actors=workers == 1 and asked.scheduler != "pbt",
                    search_alg=build_sampler(asked, plan.config.seed),
                    scheduler=build_scheduler(plan),
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


def _loggers(plan: SearchPlan) -> list[Callback]:
    """MLflow where it is installed and told where to write; TensorBoard is Tune's own default."""
    if importlib.util.find_spec("mlflow") is None or not os.environ.get("MLFLOW_TRACKING_URI"):
        return []
    from ray.air.integrations.mlflow import MLflowLoggerCallback

    experiment = plan.storage.uri.rstrip("/").rpartition("/")[2]
    return [MLflowLoggerCallback(tracking_uri=os.environ["MLFLOW_TRACKING_URI"], experiment_name=experiment)]
