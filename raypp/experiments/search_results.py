"""Tables of a search, its baseline, and full attacks on its best bundles."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

from raypp.bundle.manifest import MANIFEST
from raypp.config.schema import Config
from raypp.config.validation import validate
from raypp.experiments.pareto import hypervolume, pareto, rank_correlation, select_best
from raypp.experiments.plots import front_figure, importance_figure, label, parallel_figure
from raypp.experiments.search_records import TrialRecord
from raypp.experiments.search_settings import SUMMARY, TRIALS, Search, SearchPlan, restore_search_plan
from raypp.experiments.training_run import open_run, summary, train_locally
from raypp.utils.documents import dump_json
from raypp.utils.errors import RayppError
from raypp.utils.progress import ProgressListener
from raypp.utils.storage import Storage

BASELINE = "plain"  # the run of plain images; search.min_accuracy may refer to its accuracy

COLUMNS = (
    "trial",
    "status",
    "accuracy",
    "leakage",
    "leakage_baseline",
    "reidentification_rate",
    "psnr",
    "test_accuracy",
    "epochs",
    "seconds",
    "on_front",
    "explanation",
)
CARD_KEYS = ("reidentification_rate", "verdict", "strongest_attack", "reidentification_rate_by_reconstruction")
"""Entries of a full attack's scorecard that the summary repeats."""


def write_table(storage: Storage, records: Sequence[TrialRecord], least_accuracy: float | None) -> None:
    """Write ``trials.csv`` and ``trials.parquet``, a row per trial."""
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    front = {record["trial"] for record in pareto(records, least_accuracy)}
    keys = sorted({key for record in records for key in record["settings"]})
    rows = [
        {name: record.get(name) for name in COLUMNS}
        | {"on_front": record["trial"] in front}
        | {key: label(record["settings"].get(key)) for key in keys}
        for record in records
    ]
    if not rows:
        return
    table = pa.table({name: _column([row[name] for row in rows]) for name in rows[0]})
    for name, write in (("trials.csv", pyarrow.csv.write_csv), ("trials.parquet", pyarrow.parquet.write_table)):
        file = io.BytesIO()
        write(table, file)
        storage.write(name, file.getvalue())


def _column(values: list[Any]) -> list[Any]:
    """Values of one type for Arrow: numbers as float, values of several types as text."""
    present = [v for v in values if v is not None]
    kinds = {float if isinstance(v, int | float) and not isinstance(v, bool) else type(v) for v in present}
    if kinds == {float}:
        return [None if v is None else float(v) for v in values]
    return values if len(kinds) <= 1 else [None if v is None else str(v) for v in values]


def export_best(
    plan: SearchPlan,
    records: Sequence[TrialRecord],
    least_accuracy: float | None,
    attack: Callable[[str, str, str], dict[str, Any]],
) -> dict[str, Any]:
    """Attack and copy the best bundles, draw the figures, and write the search's summary; returns the summary.

    Args:
        least_accuracy: minimum accuracy of the best trials, or None.
        attack: runs a suite against a bundle under a name, and returns its scorecard.
    """
    storage = plan.storage
    write_table(storage, records, least_accuracy)
    _write_figures(plan, records, least_accuracy)
    best, front = select_best(records, plan.search, least_accuracy), pareto(records, least_accuracy)
    scorecards, leakage_pairs = _attack_best(plan, [*best.values(), *front], attack)
    for name, record in best.items():
        with Storage(_bundle(plan, record)).download("") as folder:
            storage.upload(folder, f"best/{name}", last=MANIFEST)
    results = {
        "trials": {word: sum(r["status"] == word for r in records) for word in sorted({r["status"] for r in records})},
        "least_accuracy": least_accuracy,
        "front": [
            {key: r[key] for key in ("trial", "settings", "accuracy", "leakage", "reidentification_rate")}
            for r in front
        ],
        "hypervolume": hypervolume(records, least_accuracy),
        "best": {name: record["trial"] for name, record in best.items()},
        "scorecards": scorecards,
        "rank_correlation": rank_correlation(leakage_pairs),
        "num_compared": len(leakage_pairs),
    }
    storage.write(SUMMARY, dump_json(results))
    return results


def _write_figures(plan: SearchPlan, records: Sequence[TrialRecord], least_accuracy: float | None) -> None:
    for name, figure in (
        ("front.png", front_figure({"search": records}, least_accuracy)),
        ("parallel.png", parallel_figure(records, least_accuracy)),
        ("importance.png", importance_figure(records, plan.search)),
    ):
        if figure is not None:
            plan.storage.write(name, figure)


def _attack_best(
    plan: SearchPlan, candidates: Sequence[TrialRecord], attack: Callable[[str, str, str], dict[str, Any]]
) -> tuple[dict[str, Any], list[tuple[float, float]]]:
    """Run the suite against the first candidates and write a report.

    Returns:
        Scorecard entries by trial, and pairs of leakage (SSIM) in the quick and in the full ``inverse`` attack.
    """
    from raypp.evaluation.report.render import write_report

    storage, search = plan.storage, plan.search
    scorecards: dict[str, Any] = {}
    leakage_pairs: list[tuple[float, float]] = []
    if search.suite is None:
        return scorecards, leakage_pairs
    distinct = {record["trial"]: record for record in candidates}
    for trial, record in list(distinct.items())[: search.num_attacked]:
        card = attack(_bundle(plan, record), search.suite, trial)
        scorecards[trial] = {key: card[key] for key in CARD_KEYS}
        inverse = card["attacks"].get("inverse", {})
        if inverse.get("status") == "done":
            ssim = inverse["scores"]["ssim_invariant"]["mean"]
            scorecards[trial]["inverse_ssim"] = ssim
            leakage_pairs.append((record["leakage"], ssim))
    if scorecards:
        write_report([storage.folder(f"attacks/{trial}").uri for trial in scorecards], storage.folder("report"))
    return scorecards, leakage_pairs


def _bundle(plan: SearchPlan, record: TrialRecord) -> str:
    return plan.storage.folder(f"{TRIALS}/{record['trial']}/bundle").uri


def baseline_config(plan: SearchPlan) -> Config:
    """Settings of a classifier of plain images, trained as the trials are."""
    tree = plan.config.model_dump(mode="json")
    tree |= {"protection": {"name": "plain"}, "adaptation": "auto"}
    tree["train"] |= {"mode": "plain"}
    tree["cluster"] |= {"storage": plan.storage.uri, "num_workers": None}
    return validate(tree)


def train_baseline(dumped: dict[str, Any], display: ProgressListener) -> float:
    """Train the baseline as a separate run, or resume it; returns its validation accuracy."""
    plan = restore_search_plan(dumped)
    resume = plan.storage.exists(f"{BASELINE}/config.yaml")
    with open_run(baseline_config(plan), BASELINE, resume=resume) as run:
        results = summary(run) or train_locally(run, display)
    return float(results["best"]["val_accuracy"])


def min_accuracy(search: Search, plain: float | None) -> float | None:
    """The minimum accuracy of trials, or None.

    Args:
        plain: accuracy on plain images, which ``search.min_accuracy`` may refer to.
    """
    if search.margin is not None:
        if plain is None:
            raise RayppError("the baseline of search.min_accuracy has not been trained")
        return plain - search.margin
    return float(search.min_accuracy) if search.min_accuracy is not None else None
