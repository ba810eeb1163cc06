"""Samplers, schedulers and stoppers of a search."""

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

MANY_EPOCHS = 2**31


def build_sampler(asked: Search, seed: int) -> Any:
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
    space = {key: plots.distribution(values) for key, values in asked.space.items()}
    if asked.objective == "both":
        metric: Any = ["told_accuracy", "told_leakage"]
        mode: Any = ["max", "min"]
    else:
        metric, mode = "told_score", "max"
    return OptunaSearch(space, metric=metric, mode=mode, sampler=kinds[asked.sampler]())


def build_param_space(asked: Search) -> dict[str, Any]:
    def domain(values: Range | tuple[Any, ...]) -> Any:
        if isinstance(values, tuple):
            return tune.choice([plots.label(value) for value in values])
        return (tune.loguniform if values.log else tune.uniform)(values.low, values.high)

    return {key: domain(values) for key, values in asked.space.items()}


def build_scheduler(plan: SearchPlan) -> Any:
    asked = plan.search
    common: dict[str, Any] = {"time_attr": "epoch", "metric": "judged", "mode": "max"}
    if asked.scheduler == "asha":
        # Trials end by themselves; what ends at max_t would not be attacked.
        return AsyncHyperBandScheduler(**common, max_t=MANY_EPOCHS, grace_period=asked.grace_epochs, reduction_factor=2)
    if asked.scheduler == "median":
        return MedianStoppingRule(**common, grace_period=asked.grace_epochs, min_samples_required=3)
    if asked.scheduler == "pbt":
        return PopulationUntilLastEpoch(
            **common,
            perturbation_interval=asked.grace_epochs,
            hyperparam_mutations=build_param_space(asked),
            custom_explore_fn=functools.partial(_clip_to_space, asked.model_dump(mode="json")),
        )
    return None


class PopulationUntilLastEpoch(PopulationBasedTraining):  # type: ignore[misc]  # Ray has no types here
    """Takes no turn after a trial's last epoch: who took over such a network would train no more."""

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> Any:
        if result["epoch"] >= result["epochs"]:
            return TrialScheduler.CONTINUE
        return super().on_trial_result(controller, trial, result)


def _clip_to_space(asked: dict[str, Any], point: dict[str, Any]) -> dict[str, Any]:
    """A perturbed point, brought back into the space's ranges."""
    space = Search.model_validate(asked).space
    limits = {key: values for key, values in space.items() if isinstance(values, Range)}
    return {
        key: min(max(value, limits[key].low), limits[key].high) if key in limits else value
        for key, value in point.items()
    }


class PatienceStopper(Stopper):  # type: ignore[misc]  # Ray has no types here
    """Ends a search after so many finished trials in a row that improved neither front nor objective."""

    def __init__(self, patience: int, objective: str, least: float | None) -> None:
        self._patience, self._objective, self._least = patience, objective, least
        self._records: list[TrialRecord] = []
        self._best, self._since = -math.inf, 0

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        if result.get("finished"):
            done = {"trial": trial_id, "status": "done", "accuracy": result["accuracy"], "leakage": result["leakage"]}
            self._records.append(done)
            if self._objective == "both":
                value = pareto.hypervolume(self._records, self._least)
            else:
                value = result["told_score"]
            self._since = 0 if value > self._best else self._since + 1
            self._best = max(self._best, value)
        return False

    def stop_all(self) -> bool:
        return self._since >= self._patience
