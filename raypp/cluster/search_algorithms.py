"""Sampler, scheduler and stopper of a search."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

from ray import tune
from ray.tune import Stopper
from ray.tune.schedulers import AsyncHyperBandScheduler, MedianStoppingRule, PopulationBasedTraining, TrialScheduler
from ray.tune.search.optuna import OptunaSearch

from raypp.experiments import pareto, plots
from raypp.experiments.search_records import TrialRecord
from raypp.experiments.search_settings import Range, Search, SearchPlan

UNLIMITED_EPOCHS = 2**31


def build_sampler(search: Search, seed: int) -> Any:
    """Optuna's sampler for Tune; None for population based training, which samples by itself."""
    import optuna

    if search.scheduler == "pbt":
        return None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    samplers = optuna.samplers
    kinds: dict[str, Callable[[], Any]] = {
        # At most a third of the trials is random; Optuna's default of ten is too many for a short search.
        "tpe": lambda: samplers.TPESampler(
            seed=seed, n_startup_trials=max(4, min(10, search.num_trials // 3)), multivariate=True, constant_liar=True
        ),
        "nsga2": lambda: samplers.NSGAIISampler(seed=seed, population_size=max(4, min(50, search.num_trials // 4))),
        "random": lambda: samplers.RandomSampler(seed=seed),
    }
    space = {key: plots.distribution(values) for key, values in search.space.items()}
    if search.objective == "both":
        metric: Any = ["objective_accuracy", "objective_leakage"]
        mode: Any = ["max", "min"]
    else:
        metric, mode = "objective_score", "max"
    return OptunaSearch(space, metric=metric, mode=mode, sampler=kinds[search.sampler]())


def build_param_space(search: Search) -> dict[str, Any]:
    def domain(values: Range | tuple[Any, ...]) -> Any:
        if isinstance(values, tuple):
            return tune.choice([plots.label(value) for value in values])
        return (tune.loguniform if values.log else tune.uniform)(values.low, values.high)

    return {key: domain(values) for key, values in search.space.items()}


def build_scheduler(plan: SearchPlan) -> Any:
    search = plan.search
    common: dict[str, Any] = {"time_attr": "epoch", "metric": "final_phase_accuracy", "mode": "max"}
    if search.scheduler == "asha":
        # A trial that the scheduler ends at max_t would miss its attack.
        return AsyncHyperBandScheduler(
            **common, max_t=UNLIMITED_EPOCHS, grace_period=search.grace_epochs, reduction_factor=2
        )
    if search.scheduler == "median":
        return MedianStoppingRule(**common, grace_period=search.grace_epochs, min_samples_required=3)
    if search.scheduler == "pbt":
        return PopulationUntilLastEpoch(
            **common,
            perturbation_interval=search.grace_epochs,
            hyperparam_mutations=build_param_space(search),
            custom_explore_fn=functools.partial(_clip_to_space, search.model_dump(mode="json")),
        )
    return None


class PopulationUntilLastEpoch(PopulationBasedTraining):  # type: ignore[misc]  # Ray has no types here
    """Ignores reports after a trial's last epoch: a trial that copied such a network would not train it."""

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> Any:
        if result["epoch"] >= result["epochs"]:
            return TrialScheduler.CONTINUE
        return super().on_trial_result(controller, trial, result)


def _clip_to_space(search: dict[str, Any], point: dict[str, Any]) -> dict[str, Any]:
    """Clip a perturbed point to the ranges of the search space."""
    space = Search.model_validate(search).space
    ranges = {key: values for key, values in space.items() if isinstance(values, Range)}
    return {
        key: min(max(value, ranges[key].low), ranges[key].high) if key in ranges else value
        for key, value in point.items()
    }


class PatienceStopper(Stopper):  # type: ignore[misc]  # Ray has no types here
    """Ends a search after ``patience`` finished trials in a row without a better front or objective."""

    def __init__(self, patience: int, objective: str, min_accuracy: float | None) -> None:
        self._patience, self._objective, self._min_accuracy = patience, objective, min_accuracy
        self._records: list[TrialRecord] = []
        self._best, self._num_since_best = -math.inf, 0

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        if result.get("finished"):
            scores = {key: result[key] for key in ("accuracy", "leakage")}
            self._records.append({"trial": trial_id, "status": "done", **scores})
            if self._objective == "both":
                value = pareto.hypervolume(self._records, self._min_accuracy)
            else:
                value = result["objective_score"]
            self._num_since_best = 0 if value > self._best else self._num_since_best + 1
            self._best = max(self._best, value)
        return False

    def stop_all(self) -> bool:
        return self._num_since_best >= self._patience
