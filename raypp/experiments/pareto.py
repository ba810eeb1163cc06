"""The Pareto front of accuracy and leakage, its knee, and rank correlation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from raypp.experiments.search import WORST_LEAKAGE, Search, TrialRecord


def feasible(record: TrialRecord, min_accuracy: float | None) -> bool:
    """Whether a trial has finished and reaches the minimum accuracy."""
    return record["status"] == "done" and (min_accuracy is None or record["accuracy"] >= min_accuracy)


def objectives(accuracy: float, leakage: float, search: Search, min_accuracy: float | None) -> dict[str, float]:
    """Values for the sampler. Infeasible trials rank below all feasible ones, by how far they miss the constraint.

    Source: the feasibility rules of Deb 2000, "An efficient constraint handling method for genetic algorithms".
    """
    violation = max(0.0, min_accuracy - accuracy) if min_accuracy is not None else 0.0
    penalized = WORST_LEAKAGE + violation if violation else leakage
    score = accuracy if search.objective == "accuracy" else -penalized
    return {"objective_accuracy": accuracy, "objective_leakage": penalized, "objective_score": score}


def pareto(records: Sequence[TrialRecord], min_accuracy: float | None = None) -> list[TrialRecord]:
    """Feasible trials that no other one equals or beats in both accuracy and leakage; by accuracy, highest first."""
    front: list[TrialRecord] = []
    candidates = [r for r in records if feasible(r, min_accuracy)]
    for record in sorted(candidates, key=lambda r: (-r["accuracy"], r["leakage"])):
        if not front or record["leakage"] < front[-1]["leakage"]:
            front.append(record)
    return front


def hypervolume(records: Sequence[TrialRecord], min_accuracy: float | None = None) -> float:
    """Area between the front and the worst corner, accuracy 0 and leakage 1; in [0, 1]."""
    area, upper = 0.0, WORST_LEAKAGE
    for record in pareto(records, min_accuracy):
        leakage = max(0.0, record["leakage"])
        area += record["accuracy"] * max(0.0, upper - leakage)
        upper = min(upper, leakage)
    return area


def knee(front: Sequence[TrialRecord]) -> TrialRecord:
    """The point of a front farthest from the line through its ends, with both objectives scaled to [0, 1]."""
    if len(front) < 3:
        return front[0]
    points = np.array([[r["accuracy"], -r["leakage"]] for r in front])
    scaled = (points - points.min(0)) / np.ptp(points, axis=0)
    # The ends lie at (1, 0) and (0, 1): the distance from their line is x + y - 1, up to a factor.
    return front[1 + int(np.argmax(scaled[1:-1].sum(axis=1)))]


def select_best(records: Sequence[TrialRecord], search: Search, min_accuracy: float | None) -> dict[str, TrialRecord]:
    """The best trials, by their folder name below ``best/``."""
    front = pareto(records, min_accuracy)
    if not front:
        return {}
    if search.objective == "accuracy":
        return {"accuracy": front[0]}
    if search.objective == "leakage":
        return {"privacy": front[-1]}
    return {"accuracy": front[0], "privacy": front[-1], "knee": knee(front)}


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Spearman's rank correlation; None for fewer than three pairs, or where one side has equal values only."""
    from scipy.stats import spearmanr

    if len(pairs) < 3 or any(len(set(side)) == 1 for side in zip(*pairs, strict=True)):
        return None
    return float(spearmanr(pairs).statistic)
