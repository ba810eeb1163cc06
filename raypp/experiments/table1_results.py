"""Table I: results of finished cells as CSV, Markdown and a figure."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raypp.config.overrides import flatten_dict
from raypp.config.presets import load_tree
from raypp.config.schema import Config
from raypp.config.validation import validate
from raypp.evaluation.plotting import as_png, new_figure
from raypp.experiments.run_folder import read_checked, same_configuration
from raypp.experiments.table1_grid import COMPARED, NOT_COMPARED, GridCell, TableRow, num_parameters, paper_name
from raypp.utils.storage import Storage

FILES = ("table1.csv", "table1.md", "table1.png")


@dataclass(frozen=True)
class CellResult:
    """What the runs of one method on one data set gave; accuracies are shares in [0, 1], one per finished seed."""

    dataset: str
    method: TableRow
    accuracies: tuple[float, ...]
    interval: tuple[float, float]
    """95% interval over the test images of the first seed."""
    num_test: int
    seconds: float
    num_parameters: int
    ssim: float | None
    failed: tuple[str, ...] = ()

    @property
    def mean(self) -> float:
        return statistics.mean(self.accuracies)

    @property
    def paper(self) -> float | None:
        """The paper's accuracy in percent, where it has this row."""
        return self.method.paper.get(paper_name(self.dataset) or "")

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds; None for fewer than two."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else None


def stored_summary(cell: GridCell) -> dict[str, Any] | None:
    """The results of a finished cell, or None.

    Raises:
        StorageError: it was trained with other settings, or its files are damaged.
    """
    run = Storage(cell.config.cluster.storage).folder(cell.name)
    if not run.exists("summary.json"):
        return None
    kept = read_checked(run, "config.yaml", "train", "data")
    same_configuration(cell.config, kept, run, cell.name)
    if kept["train"]["epochs"] != cell.config.train.epochs:
        return None
    return read_checked(run, "summary.json", "test", "seconds", "classes", "image_size")


def collect(
    grid: Iterable[GridCell], summaries: dict[str, dict[str, Any]], failures: dict[str, str] | None = None
) -> list[CellResult]:
    """Put the cells' summaries together, by data set and method, in the grid's order.

    Args:
        summaries: by the cell's name; a cell without one is left out of its row.
        failures: why a cell has none, by its name.
    """
    groups: dict[tuple[str, str], list[GridCell]] = {}
    for cell in grid:
        groups.setdefault((cell.dataset, cell.method.name), []).append(cell)
    results = []
    for (dataset, _), group in groups.items():
        found = [summaries[cell.name] for cell in group if cell.name in summaries]
        tests = [summary["test"] for summary in found]
        similarity = tests[0]["ssim"]["mean"] if tests and tests[0]["ssim"] else None
        failed = [f"{cell.name}: {(failures or {})[cell.name]}" for cell in group if cell.name in (failures or {})]
        results.append(
            CellResult(
                dataset=dataset,
                method=group[0].method,
                accuracies=tuple(test["accuracy"] for test in tests),
                interval=tuple(tests[0]["accuracy_interval"]) if tests else (0.0, 1.0),
                num_test=tests[0]["num_images"] if tests else 0,
                seconds=sum(summary["seconds"] for summary in found),
                num_parameters=_parameters(group[0].config, found[0]) if found else 0,
                ssim=similarity,
                failed=tuple(failed),
            )
        )
    return results


def _parameters(config: Config, found: dict[str, Any]) -> int:
    height, width = found["image_size"]
    return num_parameters(config, len(found["classes"]), (height, width))


def deviations_from_paper(grid: Sequence[GridCell], summaries: dict[str, dict[str, Any]]) -> list[str]:
    """What differs from the paper's experiment, as sentences: every setting, and every warning of a run."""
    from raypp.protections import PROTECTIONS

    sentences = []
    for dataset in dict.fromkeys(cell.dataset for cell in grid):
        mine = [cell for cell in grid if cell.dataset == dataset]
        paper = paper_name(dataset)
        if paper is not None:
            theirs = flatten_dict(validate(load_tree(paper)).model_dump(mode="json"))
            ours = flatten_dict(mine[0].base.model_dump(mode="json"))
            for key in sorted(ours.keys() | theirs.keys()):
                compared = key.startswith(COMPARED) and not key.startswith(NOT_COMPARED)
                if compared and ours.get(key) != theirs.get(key):
                    found, wanted = _shown(ours.get(key)), _shown(theirs.get(key))
                    sentences.append(f"{dataset}: {key} is {found}; the paper's experiment has {wanted}")
        for cell in mine:
            for warning in summaries.get(cell.name, {}).get("warnings", []):
                sentences.append(f"{dataset}: {warning}")
    if any(PROTECTIONS.get(c.config.protection.name).needs_key(c.config.protection) for c in grid):
        sentences.append("every run of a keyed scheme draws a key of its own: a seed does not repeat it bit by bit")
    sentences += [
        "the paper leaves the feature network and its layer open: VGG-16 relu2_2 is that of its authors' later code",
        "recipes of Tanaka's and the pixel-based rows are not stated in the paper: adaptation networks are those of "
        "the schemes' own sources where known, training is as in the other rows",
        "row gan is an approximation of reference [19]; the paper has no row for it",
        "accuracy is measured after 8-bit rounding; the paper's is, by its authors' later code, in float",
    ]
    return list(dict.fromkeys(sentences))


def write_table(storage: Storage, results: Sequence[CellResult], notes: Sequence[str]) -> None:
    """Write ``table1.csv``, ``table1.md`` and ``table1.png`` into the table's folder."""
    storage.write("table1.csv", _csv(results).encode())
    storage.write("table1.md", markdown(results, notes).encode())
    storage.write("table1.png", figure(results))


def _csv(results: Sequence[CellResult]) -> str:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(
        ["dataset", "method", "paper_accuracy", "accuracy_mean", "accuracy_std", "num_seeds", "num_test",
         "interval_low", "interval_high", "ssim_mean", "num_parameters", "seconds"]
    )  # fmt: skip
    for r in results:
        paper = r.paper
        row: list[Any] = [r.dataset, r.method.name, "" if paper is None else paper / 100]
        if r.accuracies:
            row += [r.mean, "" if r.spread is None else r.spread, len(r.accuracies), r.num_test, *r.interval]
            row += ["" if r.ssim is None else r.ssim, r.num_parameters, round(r.seconds, 1)]
        writer.writerow(row)
    return text.getvalue()


def markdown(results: Sequence[CellResult], notes: Sequence[str]) -> str:
    """The table as Markdown, with what failed and the notes below."""
    lines = ["# Table I", ""]
    for dataset in dict.fromkeys(r.dataset for r in results):
        lines += [
            f"## {dataset}",
            "",
            "| method | paper | ours, after 8-bit rounding | seeds | SSIM to plain | parameters | minutes |",
            "|---|---|---|---|---|---|---|",
        ]
        for r in (r for r in results if r.dataset == dataset):
            paper = r.paper
            cells = [r.method.label, "-" if paper is None else f"{paper:.2f}%", _ours(r), str(len(r.accuracies))]
            cells.append("-" if r.ssim is None else f"{r.ssim:.3f}")
            cells += [f"{r.num_parameters:,}", f"{r.seconds / 60:.1f}"] if r.accuracies else ["-", "-"]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    lines += [
        "In brackets the 95% interval over test images of a single seed; after ± the standard deviation over seeds. "
        "Minutes are those of training and validation, summed over seeds, one worker per run.",
        "",
    ]
    failed = [sentence for r in results for sentence in r.failed]
    if failed:
        lines += ["## Runs that failed", "", *(f"- {sentence}" for sentence in failed), ""]
    lines += ["## Departures from the paper", "", *(f"- {note}" for note in notes), ""]
    return "\n".join(lines)


def figure(results: Sequence[CellResult]) -> bytes:
    """The table as a PNG: a panel per data set, the paper's value beside ours."""
    datasets = list(dict.fromkeys(r.dataset for r in results))
    num = max(sum(r.dataset == d for r in results) for d in datasets)
    canvas = new_figure(3 + 5.5 * len(datasets), 1.6 + 0.42 * num)
    panels = canvas.subplots(1, len(datasets), squeeze=False)[0]
    for panel, dataset in zip(panels, datasets, strict=True):
        rows = [r for r in results if r.dataset == dataset]
        for y, r in enumerate(rows):
            paper = r.paper
            if paper is not None:
                panel.plot(paper, y, "D", color="#8a8a8a", ms=7, label="paper", zorder=2)
            if r.accuracies:
                low, high = (r.mean - r.spread, r.mean + r.spread) if r.spread is not None else r.interval
                panel.hlines(y, 100 * low, 100 * high, color="#1f6fb2", lw=2.5)
                panel.plot(100 * r.mean, y, "o", color="#1f6fb2", ms=8, label="ours", zorder=3)
                panel.annotate(
                    f"{100 * r.mean:.1f}",
                    (100 * r.mean, y),
                    (0, 7),
                    textcoords="offset points",
                    ha="center",
                    fontsize=8,
                )
        panel.set_yticks(range(len(rows)), [r.method.label for r in rows])
        panel.set_ylim(len(rows) - 0.5, -0.7)
        panel.set_xlim(0, 100)
        panel.set_xlabel("test accuracy, %")
        panel.set_title(dataset)
        panel.grid(axis="x", alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
        handles, labels = panel.get_legend_handles_labels()
        known = dict(zip(labels, handles, strict=True))
        panel.legend(known.values(), known.keys(), loc="lower left", frameon=False)
    return as_png(canvas)


def _ours(result: CellResult) -> str:
    if not result.accuracies:
        return "failed" if result.failed else "not run"
    if result.spread is not None:
        return f"{result.mean:.2%} ± {100 * result.spread:.2f}"
    low, high = result.interval
    return f"{result.mean:.2%} ({100 * low:.1f} to {100 * high:.1f})"


def _shown(value: Any) -> str:
    if isinstance(value, str) and value.startswith("/"):
        return Path(value).name  # where it lies on this machine says nothing to a reader
    return "absent" if value is None else str(value)
