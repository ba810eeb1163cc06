"""Tables of a search, its baseline, and full attacks on its best bundles."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from typing import Any

from raypp.bundle.manifest import MANIFEST
from raypp.config.schema import Config
from raypp.config.validation import validate
from raypp.experiments.pareto import hypervolume, pareto, rank_correlation, select_best
from raypp.experiments.plots import front_figure, importance_figure, label, parallel_figure
from raypp.experiments.search_records import TrialRecord
from raypp.experiments.search_settings import SUMMARY, TRIALS, Search, SearchPlan, restore_search_plan
from raypp.experiments.training_run import open_run, summary
from raypp.utils.errors import RayppError
from raypp.utils.progress import ProgressListener
from raypp.utils.storage import Storage

BASELINE = "plain"  # the run whose accuracy a constraint may name


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


def write_table(storage: Storage, records: Sequence[TrialRecord], least: float | None) -> None:
    """Write ``trials.csv`` and ``trials.parquet``, a row per trial."""
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    front = {record["trial"] for record in pareto(records, least)}
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
    """Values of one type: of choices of several kinds their text."""
    kinds = {bool if isinstance(v, bool) else float if isinstance(v, int | float) else type(v)
             for v in values if v is not None}  # fmt: skip
    if kinds == {float}:
        return [None if v is None else float(v) for v in values]
    return values if len(kinds) <= 1 else [None if v is None else str(v) for v in values]


# The end


def export_best(
    plan: SearchPlan,
    records: Sequence[TrialRecord],
    least: float | None,
    attack: Callable[[str, str, str], dict[str, Any]],
) -> dict[str, Any]:
    """Attack and copy the best bundles, draw the pictures, and write the search's summary; returns it.

    Args:
        least: the accuracy that is asked for, or None.
        attack: runs a suite against a bundle under a name, and returns its scorecard.
    """
    from raypp.evaluation.report.render import write_report

    storage, search = plan.storage, plan.search
    write_table(storage, records, least)
    storage.write("front.png", front_figure({"search": records}, least))
    for name, picture in (
        ("parallel.png", parallel_figure(records, least)),
        ("importance.png", importance_figure(records, search)),
    ):
        if picture is not None:
            storage.write(name, picture)
    best, front = select_best(records, search, least), pareto(records, least)
    scorecards: dict[str, Any] = {}
    pairs = []
    if search.suite is not None:
        wanted = list({r["trial"]: r for r in [*best.values(), *front]}.values())[: search.num_attacked]
        for record in wanted:
            card = attack(_bundle(plan, record), search.suite, record["trial"])
            kept = ("reidentification_rate", "verdict", "strongest_attack", "reidentification_rate_by_reconstruction")
            scorecards[record["trial"]] = {key: card[key] for key in kept}
            strong = card["attacks"].get("inverse", {})
            if strong.get("status") == "done":
                scorecards[record["trial"]]["inverse_ssim"] = strong["scores"]["ssim_invariant"]["mean"]
                pairs.append((record["leakage"], strong["scores"]["ssim_invariant"]["mean"]))
        if scorecards:
            write_report([storage.folder(f"attacks/{trial}").uri for trial in scorecards], storage.folder("report"))
    for name, record in best.items():
        with Storage(_bundle(plan, record)).download("") as folder:
            storage.upload(folder, f"best/{name}", last=MANIFEST)
    found = {
        "trials": {word: sum(r["status"] == word for r in records) for word in sorted({r["status"] for r in records})},
        "least_accuracy": least,
        "front": [
            {key: r[key] for key in ("trial", "settings", "accuracy", "leakage", "reidentification_rate")}
            for r in front
        ],
        "hypervolume": hypervolume(records, least),
        "best": {name: record["trial"] for name, record in best.items()},
        "scorecards": scorecards,
        "rank_correlation": rank_correlation(pairs),
        "num_compared": len(pairs),
    }
    storage.write(SUMMARY, (json.dumps(found, indent=2) + "\n").encode())
    return found


def _bundle(plan: SearchPlan, record: TrialRecord) -> str:
    return plan.storage.folder(f"{TRIALS}/{record['trial']}/bundle").uri


def baseline_config(plan: SearchPlan) -> Config:
    """A classifier of plain images, trained as the trials are."""
    tree = plan.config.model_dump(mode="json")
    tree |= {"protection": {"name": "plain"}, "adaptation": "auto"}
    tree["train"] |= {"mode": "plain"}
    tree["cluster"] |= {"storage": plan.storage.uri, "num_workers": None}
    return validate(tree)


def train_baseline(dumped: dict[str, Any], display: ProgressListener) -> float:
    """Train the baseline as a run of its own, from where it was stopped; returns its validation accuracy."""
    from raypp.experiments.training_run import train_locally

    plan = restore_search_plan(dumped)
    begun = plan.storage.exists(f"{BASELINE}/config.yaml")
    with open_run(baseline_config(plan), BASELINE, resume=begun) as run:
        found = summary(run) or train_locally(run, display)
    return float(found["best"]["val_accuracy"])


def min_accuracy(search: Search, plain: float | None) -> float | None:
    """The accuracy that trials have to reach, given that of plain images."""
    if search.margin is not None:
        if plain is None:
            raise RayppError("the baseline of search.min_accuracy has not been trained")
        return plain - search.margin
    return float(search.min_accuracy) if search.min_accuracy is not None else None
