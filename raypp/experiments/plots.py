"""Figures of a search: front, parallel coordinates, parameter importance."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from raypp.evaluation.output import as_png, new_figure, styled
from raypp.experiments.pareto import feasible, pareto
from raypp.experiments.search import Range, Search, TrialRecord

COLORS = ("#1f6fb2", "#d1602b", "#3a8f4f", "#8a5fb0")


def label(value: Any) -> Any:
    """A setting's value as a scalar: a mapping as ``one_cycle (warmup 0.25)``, a list as its JSON."""
    if isinstance(value, dict) and "name" in value:
        options = ", ".join(f"{key} {json.dumps(option)}" for key, option in value.items() if key != "name")
        return f"{value['name']} ({options})" if options else value["name"]
    return json.dumps(value) if isinstance(value, dict | list | tuple) else value


@styled
def front_figure(searches: dict[str, Sequence[TrialRecord]], min_accuracy: float | None = None) -> bytes:
    """Plot leakage against accuracy of every finished trial, with the front of each search, as a PNG."""
    figure, (axes,) = new_figure(7.2, 5.0)
    baselines = [r["leakage_baseline"] for records in searches.values() for r in records if r["status"] == "done"]
    for (name, records), color in zip(searches.items(), COLORS, strict=False):
        done = [r for r in records if r["status"] == "done"]
        for marker, is_feasible in (("o", True), ("x", False)):
            points = [r for r in done if feasible(r, min_accuracy) == is_feasible]
            axes.plot(*_coordinates(points), marker, color=color, alpha=0.4)
        front = pareto(records, min_accuracy)
        axes.step(
            *_coordinates(front),
            "o-",
            where="post",  # no trial with at least this accuracy leaks less
            color=color,
            label=f"{name}: front of {len(front)} among {len(done)} trials",
        )
    line = {"color": "#555555", "lw": 1.2}
    if baselines:
        axes.axhline(float(np.mean(baselines)), ls=":", label="fitted class image (baseline)", **line)
    if min_accuracy is not None:
        axes.axvline(100 * min_accuracy, ls="--", label=f"minimum accuracy, {min_accuracy:.1%}", **line)
    axes.set_xlabel("validation accuracy after 8-bit rounding, % (higher is better)")
    axes.set_ylabel("leakage: SSIM of the quick attack (lower is better)")
    axes.legend(fontsize=8)
    return as_png(figure)


def _coordinates(records: Sequence[TrialRecord]) -> tuple[list[float], list[float]]:
    """Accuracy in percent, and leakage."""
    return [100 * r["accuracy"] for r in records], [r["leakage"] for r in records]


@styled
def parallel_figure(records: Sequence[TrialRecord], min_accuracy: float | None = None) -> bytes | None:
    """Plot every finished trial as a line through its settings and scores; trials of the front are blue."""
    done = [r for r in records if r["status"] == "done"]
    if not done:
        return None
    keys = sorted({key for r in done for key in r["settings"]})
    columns = {key: [label(r["settings"].get(key)) for r in done] for key in keys}
    columns |= {key: [r[key] for r in done] for key in ("accuracy", "leakage")}
    figure, (axes,) = new_figure(2.2 + 1.5 * len(columns), 4.6)
    heights = []
    for x, values in enumerate(columns.values()):
        scaled, ticks = _scale_column(values)
        heights.append(scaled)
        axes.axvline(x, color="#bbbbbb", lw=1, zorder=0)
        for y, text in ticks.items():
            axes.text(x, y, f" {text}", fontsize=7, va="bottom" if y < 1 else "top", color="#333333")
    front = {r["trial"] for r in pareto(records, min_accuracy)}
    for record, line in zip(done, zip(*heights, strict=True), strict=True):
        style: dict[str, Any] = {"color": "#c9c9c9", "lw": 0.9, "zorder": 1}
        if record["trial"] in front:
            style = {"color": "#1f6fb2", "lw": 1.8, "zorder": 2}
        axes.plot(range(len(columns)), line, **style)
    axes.set_xticks(range(len(columns)), [key.replace(".", ".\n") for key in columns], fontsize=8)
    axes.set_yticks([])
    axes.set_xlim(-0.3, len(columns) - 0.3)
    axes.set_title("settings and scores of all trials; blue: on the front", fontsize=10)
    return as_png(figure)


def _scale_column(values: Sequence[Any]) -> tuple[list[float], dict[float, str]]:
    """Values scaled to [0, 1], and the labels of the axis by height; numbers over a factor of 20 are logarithmic."""
    from matplotlib.colors import LogNorm, Normalize

    if all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        low, high = float(min(values)), float(max(values))
        ticks = {0.0: f"{low:.3g}", 1.0: f"{high:.3g}"}
        scale = LogNorm if low > 0 and high / low >= 20 else Normalize
    else:
        choices = sorted({str(v) for v in values})
        values = [choices.index(str(v)) for v in values]
        low, high = 0.0, float(len(choices) - 1)
        ticks = {i / max(1, len(choices) - 1): choice[:24] for i, choice in enumerate(choices)}
        scale = Normalize
    scaled = scale(low, high)(np.array(values, dtype=float)) if low < high else np.full(len(values), 0.5)
    return scaled.tolist(), ticks


@styled
def importance_figure(records: Sequence[TrialRecord], search: Search) -> bytes | None:
    """Plot each setting's importance for accuracy and leakage; None for fewer than six finished trials.

    Source: fANOVA, Hutter, Hoos, Leyton-Brown 2014, in Optuna's implementation.
    """
    done = [r for r in records if r["status"] == "done"]
    if len(done) < 6:
        return None
    importances = {score: _importances(done, search, score) for score in ("accuracy", "leakage")}
    if not any(importances.values()):
        return None
    keys = sorted(search.space, key=lambda key: sum(shares.get(key, 0) for shares in importances.values()))
    figure, (axes,) = new_figure(7.0, 1.6 + 0.5 * len(keys))
    for (score, shares), shift, color in zip(importances.items(), (0.18, -0.18), COLORS, strict=False):
        if shares:
            values = [shares.get(key, 0.0) for key in keys]
            axes.barh([y + shift for y in range(len(keys))], values, height=0.34, color=color, label=score)
    axes.set_yticks(range(len(keys)), keys)
    axes.set_xlabel("importance (fANOVA), shares of 1")
    axes.legend()
    return as_png(figure)


def _importances(done: Sequence[TrialRecord], search: Search, score: str) -> dict[str, float]:
    """Each setting's share of the variance of a score; empty where all values are equal."""
    from optuna import create_study, importance, trial

    spaces = {key: distribution(values) for key, values in search.space.items()}
    study = create_study()
    for record in done:
        params = {key: label(record["settings"][key]) for key in spaces}
        study.add_trial(trial.create_trial(params=params, distributions=spaces, value=record[score]))
    try:
        evaluator = importance.FanovaImportanceEvaluator(seed=0)
        return importance.get_param_importances(study, evaluator=evaluator)
    except (ValueError, RuntimeError):  # fANOVA needs values that differ
        return {}


def distribution(values: Range | tuple[Any, ...]) -> Any:
    """The Optuna distribution of a setting of the search space."""
    from optuna import distributions

    if isinstance(values, tuple):
        return distributions.CategoricalDistribution([label(value) for value in values])
    kind: Any = distributions.IntDistribution if values.whole else distributions.FloatDistribution
    return kind(values.low, values.high, log=values.log)
