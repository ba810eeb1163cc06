"""The Pareto front of accuracy and leakage, its knee, and rank correlation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from raypp.experiments.search_records import WORST_LEAKAGE, TrialRecord
from raypp.experiments.search_settings import Search

# All of them


def feasible(record: TrialRecord, least: float | None) -> bool:
    """Whether a trial has reached its end and the accuracy that is asked for."""
    return record["status"] == "done" and (least is None or record["accuracy"] >= least)


def objectives(accuracy: float, leakage: float, search: Search, least: float | None) -> dict[str, float]:
    """What the sampler is told. Trials that miss the constraint are worse than all that keep it, by how far they miss.

    Source: the feasibility rules of Deb 2000, "An efficient constraint handling method for genetic algorithms".
    """
    missing = max(0.0, least - accuracy) if least is not None else 0.0
    told_leakage = WORST_LEAKAGE + missing if missing else leakage
    score = accuracy if search.objective == "accuracy" else -told_leakage
    return {"told_accuracy": accuracy, "told_leakage": told_leakage, "told_score": score}


def pareto(records: Sequence[TrialRecord], least: float | None = None) -> list[TrialRecord]:
    """Finished trials that no other one equals or beats in both accuracy and leakage; by accuracy, highest first."""
    front: list[TrialRecord] = []
    done = [r for r in records if feasible(r, least)]
    for record in sorted(done, key=lambda r: (-r["accuracy"], r["leakage"])):
        if not front or record["leakage"] < front[-1]["leakage"]:
            front.append(record)
    return front


def hypervolume(records: Sequence[TrialRecord], least: float | None = None) -> float:
    """Area between the front and the worst corner, accuracy 0 and leakage 1; in [0, 1]."""
    area, before = 0.0, WORST_LEAKAGE
    for record in pareto(records, least):
        leakage = max(0.0, record["leakage"])
        area += record["accuracy"] * max(0.0, before - leakage)
        before = min(before, leakage)
    return area


def knee(front: Sequence[TrialRecord]) -> TrialRecord:
    """The point between a front's ends that is farthest out from their line, both objectives scaled to [0, 1]."""
    if len(front) < 3:
        return front[0]
    points = np.array([[r["accuracy"], -r["leakage"]] for r in front])
    scaled = (points - points.min(0)) / np.ptp(points, axis=0)
    # Its ends lie at (1, 0) and (0, 1): the distance from their line is x + y - 1, up to a factor.
    inner = scaled[1:-1].sum(axis=1)
    return front[1 + int(np.argmax(inner))]


def select_best(records: Sequence[TrialRecord], search: Search, least: float | None) -> dict[str, TrialRecord]:
    """What is handed over, by its name below ``best/``."""
    front = pareto(records, least)
    if not front:
        return {}
    if search.objective == "accuracy":
        return {"accuracy": front[0]}
    if search.objective == "leakage":
        return {"privacy": front[-1]}
    return {"accuracy": front[0], "privacy": front[-1], "knee": knee(front)}


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Spearman's, of at least three pairs that are not all tied; else None."""
    if len(pairs) < 3:
        return None
    ranks = [np.array([sum(y < x for y in column) + sum(y == x for y in column) / 2 for x in column])
             for column in zip(*pairs, strict=True)]  # fmt: skip
    if any(np.ptp(rank) == 0 for rank in ranks):
        return None
    return float(np.corrcoef(np.stack(ranks))[0, 1])
