"""Figures of a search: front, parallel coordinates, parameter importance."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from raypp.evaluation.plotting import as_png, new_figure
from raypp.experiments.pareto import feasible, pareto
from raypp.experiments.search_records import TrialRecord
from raypp.experiments.search_settings import Range, Search


def label(value: Any) -> Any:
    """A setting's value as a scalar: a mapping as ``one_cycle (warmup 0.25)``, a list as its JSON."""
    if isinstance(value, dict) and "name" in value:
        rest = ", ".join(f"{key} {json.dumps(inner)}" for key, inner in value.items() if key != "name")
        return f"{value['name']} ({rest})" if rest else value["name"]
    return json.dumps(value) if isinstance(value, dict | list | tuple) else value


# Pictures


def front_figure(searches: dict[str, Sequence[TrialRecord]], least: float | None = None) -> bytes:
    """Leakage against accuracy of every finished trial, with the front of each search, as a PNG."""
    canvas, panel = _panel(7.2, 5.0)
    colours = ("#1f6fb2", "#d1602b", "#3a8f4f", "#8a5fb0")
    null = [r["leakage_baseline"] for records in searches.values() for r in records if r["status"] == "done"]
    for (name, records), colour in zip(searches.items(), colours, strict=False):
        done = [r for r in records if r["status"] == "done"]
        missed = [r for r in done if not feasible(r, least)]
        front = pareto(records, least)
        kept = [r for r in done if r not in missed]
        panel.plot([100 * r["accuracy"] for r in kept], [r["leakage"] for r in kept], "o", color=colour, alpha=0.4)
        panel.plot([100 * r["accuracy"] for r in missed], [r["leakage"] for r in missed], "x", color=colour, alpha=0.4)
        panel.step(
            [100 * r["accuracy"] for r in front],
            [r["leakage"] for r in front],
            "o-",
            where="post",  # with so much accuracy no trial leaks less
            color=colour,
            label=f"{name}: front of {len(front)} among {len(done)} trials",
        )
    if null:
        panel.axhline(float(np.mean(null)), color="#555555", ls=":", lw=1.2, label="class mean (null)")
    if least is not None:
        panel.axvline(100 * least, color="#555555", ls="--", lw=1.2, label=f"least accuracy, {least:.1%}")
    panel.set_xlabel("validation accuracy after 8-bit rounding, % (better to the right)")
    panel.set_ylabel("leakage: SSIM of the quick attack (better below)")
    panel.legend(frameon=False, fontsize=8)
    return as_png(canvas)


def parallel_figure(records: Sequence[TrialRecord], least: float | None = None) -> bytes | None:
    """Every finished trial as a line through its settings and scores; those of the front are drawn in colour."""
    done = [r for r in records if r["status"] == "done"]
    if not done:
        return None
    keys = sorted({key for r in done for key in r["settings"]})
    axes = [*keys, "accuracy", "leakage"]
    columns = {key: [label(r["settings"].get(key)) for r in done] for key in keys}
    columns |= {key: [r[key] for r in done] for key in ("accuracy", "leakage")}
    canvas, panel = _panel(2.2 + 1.5 * len(axes), 4.6)
    heights = []
    for x, key in enumerate(axes):
        values = columns[key]
        numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
        if numeric:
            low, high = float(min(values)), float(max(values))
            logarithmic = low > 0 and high / low >= 20
            at = [math.log(v) if logarithmic else float(v) for v in values]
            ends = (math.log(low), math.log(high)) if logarithmic else (low, high)
            ticks = {0.0: f"{low:.3g}", 1.0: f"{high:.3g}"}
        else:
            kinds = sorted({str(v) for v in values})
            at, ends = [float(kinds.index(str(v))) for v in values], (0.0, float(len(kinds) - 1))
            ticks = {i / max(1, len(kinds) - 1): kind[:24] for i, kind in enumerate(kinds)}
        span = ends[1] - ends[0]
        heights.append([(v - ends[0]) / span if span else 0.5 for v in at])
        panel.axvline(x, color="#bbbbbb", lw=1, zorder=0)
        for y, text in ticks.items():
            panel.text(x, y, f" {text}", fontsize=7, va="bottom" if y < 1 else "top", color="#333333")
    front = {r["trial"] for r in pareto(records, least)}
    for i, record in enumerate(done):
        best = record["trial"] in front
        panel.plot(range(len(axes)), [column[i] for column in heights], color="#1f6fb2" if best else "#c9c9c9",
                   lw=1.8 if best else 0.9, zorder=2 if best else 1)  # fmt: skip
    panel.set_xticks(range(len(axes)), [key.replace(".", ".\n") for key in axes], fontsize=8)
    panel.set_yticks([])
    panel.set_xlim(-0.3, len(axes) - 0.3)
    panel.set_title("trials through their settings and scores; blue: on the front", fontsize=10)
    return as_png(canvas)


def importance_figure(records: Sequence[TrialRecord], search: Search) -> bytes | None:
    """How much each setting says about accuracy and leakage; None for fewer than six finished trials.

    Source: fANOVA, Hutter, Hoos, Leyton-Brown 2014, as Optuna has it.
    """
    import optuna
    from optuna.importance import FanovaImportanceEvaluator

    done = [r for r in records if r["status"] == "done"]
    if len(done) < 6:
        return None
    spaces = {key: distribution(values) for key, values in search.space.items()}
    found = {}
    for what in ("accuracy", "leakage"):
        study = optuna.create_study(direction="maximize" if what == "accuracy" else "minimize")
        for r in done:
            params = {key: label(r["settings"][key]) for key in spaces}
            study.add_trial(optuna.trial.create_trial(params=params, distributions=spaces, value=r[what]))
        try:
            shares = optuna.importance.get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0))
        except (ValueError, RuntimeError):  # of values that are all alike nothing can be said
            continue
        found[what] = shares
    if not found:
        return None
    keys = sorted(spaces, key=lambda key: sum(shares.get(key, 0) for shares in found.values()))
    canvas, panel = _panel(7.0, 1.6 + 0.5 * len(keys))
    for shift, (what, colour) in zip((0.18, -0.18), (("accuracy", "#1f6fb2"), ("leakage", "#d1602b")), strict=True):
        if what in found:
            values = [found[what].get(key, 0.0) for key in keys]
            panel.barh([y + shift for y in range(len(keys))], values, height=0.34, color=colour, label=what)
    panel.set_yticks(range(len(keys)), keys)
    panel.set_xlabel("importance (fANOVA), shares of 1")
    panel.legend(frameon=False)
    return as_png(canvas)


def distribution(values: Range | tuple[Any, ...]) -> Any:
    from optuna import distributions

    if isinstance(values, tuple):
        return distributions.CategoricalDistribution([label(value) for value in values])
    if values.whole:
        return distributions.IntDistribution(int(values.low), int(values.high), log=values.log)
    return distributions.FloatDistribution(float(values.low), float(values.high), log=values.log)


def _panel(width: float, height: float) -> tuple[Any, Any]:
    canvas = new_figure(width, height)
    panel = canvas.subplots()
    panel.spines[["top", "right"]].set_visible(False)
    return canvas, panel
