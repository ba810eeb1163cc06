"""Tables of a search, its baseline, and full attacks on its best bundles."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

from raypp.bundle.manifest import MANIFEST
from raypp.config.validation import validate
from raypp.experiments.pareto import hypervolume, pareto, rank_correlation, select_best
from raypp.experiments.plots import front_figure, importance_figure, label, parallel_figure
from raypp.experiments.search import SUMMARY, TRIALS, Search, SearchPlan, TrialRecord, restore_search_plan
from raypp.experiments.training_run import open_run, summary, train_locally
from raypp.utils.documents import dump_json
from raypp.utils.progress import ProgressListener
from raypp.utils.storage import Storage

BASELINE = "plain"  # the run of plain images; search.min_accuracy may refer to its accuracy
COLUMNS = (
    "trial", "status", "accuracy", "leakage", "leakage_baseline", "reidentification_rate", "psnr", "test_accuracy",
    "epochs", "seconds", "on_front", "explanation",
)  # fmt: skip
POINT_KEYS = ("trial", "settings", "accuracy", "leakage", "reidentification_rate")
"""Entries of a trial's record that the summary repeats."""
CARD_KEYS = ("reidentification_rate", "verdict", "strongest_attack", "reidentification_rate_by_reconstruction")
"""Entries of a full attack's scorecard that the summary repeats."""

AttackBundle = Callable[[str, str, str], dict[str, Any]]
"""Runs a suite against a bundle under a name, and returns its scorecard: ``attack(bundle, suite, name)``."""


def write_table(storage: Storage, records: Sequence[TrialRecord], min_accuracy: float | None) -> None:
    """Write ``trials.csv`` and ``trials.parquet``, a row per trial."""
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    if not records:
        return
    front = {record["trial"] for record in pareto(records, min_accuracy)}
    columns = {name: [record.get(name) for record in records] for name in COLUMNS}
    columns["on_front"] = [record["trial"] in front for record in records]
    for key in sorted({key for record in records for key in record["settings"]}):
        columns[key] = [label(record["settings"].get(key)) for record in records]
    table = pa.table({name: _column(values) for name, values in columns.items()})
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
    plan: SearchPlan, records: Sequence[TrialRecord], min_accuracy: float | None, attack: AttackBundle
) -> dict[str, Any]:
    """Attack and copy the best bundles, draw the figures, and write the search's summary; returns the summary.

    Args:
        min_accuracy: minimum accuracy of the best trials, or None.
    """
    storage = plan.storage
    write_table(storage, records, min_accuracy)
    for file, figure in (
        ("front.png", front_figure({"search": records}, min_accuracy)),
        ("parallel.png", parallel_figure(records, min_accuracy)),
        ("importance.png", importance_figure(records, plan.search)),
    ):
        if figure is not None:
            storage.write(file, figure)
    best, front = select_best(records, plan.search, min_accuracy), pareto(records, min_accuracy)
    scorecards = _attack_best(plan, [*best.values(), *front], attack)
    for name, record in best.items():
        with _bundle(plan, record["trial"]).download("") as folder:
            storage.upload(folder, f"best/{name}", last=MANIFEST)
    leakage = {record["trial"]: record["leakage"] for record in front}
    leakage_pairs = [  # SSIM in the quick attack and in the full one
        (leakage[trial], card["inverse_ssim"]) for trial, card in scorecards.items() if "inverse_ssim" in card
    ]
    results = {
        "trials": {word: sum(r["status"] == word for r in records) for word in sorted({r["status"] for r in records})},
        "least_accuracy": min_accuracy,
        "front": [{key: record[key] for key in POINT_KEYS} for record in front],
        "hypervolume": hypervolume(records, min_accuracy),
        "best": {name: record["trial"] for name, record in best.items()},
        "scorecards": scorecards,
        "rank_correlation": rank_correlation(leakage_pairs),
        "num_compared": len(leakage_pairs),
    }
    storage.write(SUMMARY, dump_json(results))
    return results


def _attack_best(plan: SearchPlan, candidates: Sequence[TrialRecord], attack: AttackBundle) -> dict[str, Any]:
    """Run the suite against the first candidates and write a report; returns scorecard entries by trial."""
    from raypp.evaluation.report.render import write_report

    search = plan.search
    scorecards: dict[str, Any] = {}
    if search.suite is None:
        return scorecards
    distinct = dict.fromkeys(record["trial"] for record in candidates)
    for trial in list(distinct)[: search.num_attacked]:
        card = attack(_bundle(plan, trial).uri, search.suite, trial)
        scorecards[trial] = {key: card[key] for key in CARD_KEYS}
        inverse = card["attacks"].get("inverse", {})
        if inverse.get("status") == "done":
            scorecards[trial]["inverse_ssim"] = inverse["scores"]["ssim_invariant"]["mean"]
    if scorecards:
        runs = [plan.storage.folder(f"attacks/{trial}").uri for trial in scorecards]
        write_report(runs, plan.storage.folder("report"))
    return scorecards


def _bundle(plan: SearchPlan, trial: str) -> Storage:
    return plan.storage.folder(f"{TRIALS}/{trial}/bundle")


def train_baseline(dumped: dict[str, Any], display: ProgressListener) -> float:
    """Train a classifier of plain images as the trials are trained, or resume it; returns its validation accuracy."""
    plan = restore_search_plan(dumped)
    tree = plan.config.model_dump(mode="json")
    tree |= {"protection": {"name": "plain"}, "adaptation": "auto"}
    tree["train"] |= {"mode": "plain"}
    tree["cluster"] |= {"storage": plan.storage.uri, "num_workers": None}
    resume = plan.storage.exists(f"{BASELINE}/config.yaml")
    with open_run(validate(tree), BASELINE, resume=resume) as run:
        results = summary(run) or train_locally(run, display)
    return float(results["best"]["val_accuracy"])


def min_accuracy(search: Search, plain: float | None) -> float | None:
    """The minimum accuracy of trials, or None.

    Args:
        plain: accuracy on plain images, which ``search.min_accuracy`` may refer to.
    """
    if search.margin is not None:
        assert plain is not None
        return plain - search.margin
    return float(search.min_accuracy) if search.min_accuracy is not None else None
