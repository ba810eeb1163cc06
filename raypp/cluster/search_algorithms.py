"""Sampler, scheduler and stopper of a search."""

from __future__ import annotations

import functools
import math
from typing import Any

from ray import tune
from ray.tune import Stopper
from ray.tune.schedulers import AsyncHyperBandScheduler, MedianStoppingRule, PopulationBasedTraining, TrialScheduler
from ray.tune.search.optuna import OptunaSearch

from raypp.experiments import pareto, plots
from raypp.experiments.search import Range, Search, SearchPlan, TrialRecord

UNLIMITED_EPOCHS = 2**31


def build_sampler(search: Search, seed: int) -> Any:
    """Optuna's sampler for Tune; None for population based training, which samples by itself."""
    import optuna

    if search.scheduler == "pbt":
        return None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    samplers = optuna.samplers
    sampler: samplers.BaseSampler
    if search.sampler == "tpe":
        # At most a third of the trials is random; Optuna's default of ten is too many for a short search.
        num_random = max(4, min(10, search.num_trials // 3))
        sampler = samplers.TPESampler(seed=seed, n_startup_trials=num_random, multivariate=True, constant_liar=True)
    elif search.sampler == "nsga2":
        sampler = samplers.NSGAIISampler(seed=seed, population_size=max(4, min(50, search.num_trials // 4)))
    else:
        sampler = samplers.RandomSampler(seed=seed)
    space = {key: plots.distribution(values) for key, values in search.space.items()}
    metric: Any = "objective_score"
    mode: Any = "max"
    if search.objective == "both":
        metric, mode = ["objective_accuracy", "objective_leakage"], ["max", "min"]
    return OptunaSearch(space, metric=metric, mode=mode, sampler=sampler)


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
    """Compares trials at epochs with a checkpoint only, and not after the last one.

    A trial that copied a network of the last epoch would not train it.
    """

    def __init__(self, *, perturbation_interval: int, **options: Any) -> None:
        super().__init__(perturbation_interval=perturbation_interval, **options)
        self._interval = perturbation_interval

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> Any:
        if result["epoch"] >= result["epochs"] or result["epoch"] % self._interval:
            return TrialScheduler.CONTINUE
        return super().on_trial_result(controller, trial, result)


def _clip_to_space(search: dict[str, Any], point: dict[str, Any]) -> dict[str, Any]:
    """Clip a perturbed point to the ranges of the search space."""
    ranges = {k: values for k, values in Search.model_validate(search).space.items() if isinstance(values, Range)}
    return point | {key: min(max(point[key], values.low), values.high) for key, values in ranges.items()}


class PatienceStopper(Stopper):  # type: ignore[misc]  # Ray has no types here
    """Ends a search after ``patience`` finished trials in a row without a better front or objective."""

    def __init__(self, patience: int, objective: str, min_accuracy: float | None) -> None:
        self._patience, self._objective, self._min_accuracy = patience, objective, min_accuracy
        self._records: list[TrialRecord] = []
        self._best, self._num_since_best = -math.inf, 0

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        if result.get("finished"):
            self._records.append({"status": "done", "accuracy": result["accuracy"], "leakage": result["leakage"]})
            is_both = self._objective == "both"
            value = pareto.hypervolume(self._records, self._min_accuracy) if is_both else result["objective_score"]
            self._num_since_best = 0 if value > self._best else self._num_since_best + 1
            self._best = max(self._best, value)
        return False

    def stop_all(self) -> bool:
        return self._num_since_best >= self._patience
