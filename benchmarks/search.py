"""Searches with the same budget beside each other: hypervolume, front and figure of each.

    python benchmarks/search.py tpe=runs/tpe random=runs/random --figure fronts.png

Each folder is one of `raypp tune`. The hypervolume is the area between the front and the worst corner, accuracy 0 and
leakage 1. How it grows with the number of trials says more than its end: it is printed after each quarter.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import yaml
from _common import describe, finish, machine, show_table

from raypp.experiments.pareto import hypervolume, pareto
from raypp.experiments.plots import front_figure
from raypp.experiments.search import TrialRecord, restore_search_plan, trial_records
from raypp.utils.errors import ConfigError
from raypp.utils.storage import Storage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("searches", nargs="+", help="NAME=FOLDER of each search")
    parser.add_argument("--figure", type=Path, help="write the fronts here, as a PNG")
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args()
    start = machine()
    print(describe(start) + "\n")
    searches: dict[str, Sequence[TrialRecord]] = {}
    for text in options.searches:
        name, _, folder = text.partition("=")
        if not folder:
            raise SystemExit(f"{text!r} is not understood; allowed is NAME=FOLDER")
        storage = Storage(folder)
        try:
            plan = restore_search_plan(yaml.safe_load(storage.read("search.yaml")))
        except ConfigError as error:
            raise SystemExit(f"{folder} is no search of this version: {error}") from None
        order = storage.folder("trials")
        records = trial_records(plan)
        records.sort(key=lambda r: (order.path / r["trial"] / "trial.json").stat().st_mtime)
        searches[name] = records
    rows = []
    results = {}
    for name, trials in searches.items():
        quarters = [hypervolume(trials[: max(1, round(len(trials) * share))]) for share in (0.25, 0.5, 0.75, 1.0)]
        front = pareto(trials)
        hours = sum(r["seconds"] for r in trials) / 3600
        results[name] = {"hypervolume": quarters, "front": [(r["accuracy"], r["leakage"]) for r in front]}
        rows.append([name, str(len(trials)), f"{hours:.2f}", str(len(front)), *(f"{q:.4f}" for q in quarters)])
    show_table(
        "hypervolume after a quarter, half, three quarters and all of the finished trials",
        ["search", "trials", "hours of trials", "front", "1/4", "1/2", "3/4", "all"],
        rows,
    )
    if options.figure is not None:
        options.figure.write_bytes(front_figure(searches))
        print(f"wrote {options.figure}")
    finish(options.json, "search", start, results)


if __name__ == "__main__":
    main()
