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
from raypp.config.validation import validate
from raypp.evaluation.output import as_png, new_figure, styled
from raypp.experiments.run_folder import check_resumable, read_checked
from raypp.experiments.table1_grid import COMPARED, NOT_COMPARED, GridCell, TableRow, num_parameters, paper_name
from raypp.metrics.statistics import chance_error
from raypp.utils.storage import Storage

COLUMNS = (
    "dataset", "method", "paper_accuracy", "accuracy_mean", "accuracy_std", "num_seeds", "num_test", "interval_low",
    "interval_high", "ssim_mean", "num_parameters", "seconds",
)  # fmt: skip


@dataclass(frozen=True)
class CellResult:
    """Results of one method on one data set; accuracies are shares in [0, 1], one per finished seed."""

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
    at_chance: tuple[str, ...] = ()
    """A sentence for each run whose classifier is at chance."""

    @property
    def mean(self) -> float:
        return statistics.mean(self.accuracies)

    @property
    def paper(self) -> float | None:
        """The paper's accuracy in percent, if it has this row."""
        return self.method.paper.get(paper_name(self.dataset) or "")

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds; None for fewer than two."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else None

    def to_dict(self) -> dict[str, Any]:
        """The row as plain data; accuracies are shares, and None where no run of the row has finished."""
        done = bool(self.accuracies)
        return {
            "data": self.dataset,
            "method": self.method.name,
            "paper": self.paper,
            "accuracy": self.mean if done else None,
            "low": self.interval[0] if done else None,
            "high": self.interval[1] if done else None,
            "spread": self.spread if done else None,
            "ssim": self.ssim if done else None,
            "seeds": len(self.accuracies),
            "at_chance": list(self.at_chance),
        }


def stored_summary(cell: GridCell) -> dict[str, Any] | None:
    """The results of a finished cell, or None.

    Raises:
        StorageError: the cell was trained with other settings, or its files are damaged.
    """
    run = Storage(cell.config.cluster.storage).folder(cell.name)
    if not run.exists("summary.json"):
        return None
    stored = read_checked(run, "config.yaml", "train", "data")
    check_resumable(cell.config, stored, run, cell.name)
    if stored["train"]["epochs"] != cell.config.train.epochs:
        return None
    return read_checked(run, "summary.json", "test", "seconds", "classes", "image_size")


def collect(
    grid: Iterable[GridCell], summaries: dict[str, dict[str, Any]], failures: dict[str, str] | None = None
) -> list[CellResult]:
    """Combine summaries by data set and method, in the grid's order.

    Args:
        summaries: by the cell's name; a cell without one does not count.
        failures: error messages by the cell's name.
    """
    failures = failures or {}
    groups: dict[tuple[str, str], list[GridCell]] = {}
    for cell in grid:
        groups.setdefault((cell.dataset, cell.method.name), []).append(cell)
    results = []
    for (dataset, _), group in groups.items():
        named = {cell.name: summaries[cell.name] for cell in group if cell.name in summaries}
        finished = list(named.values())
        errors = {name: chance_error(summary["test"], len(summary["classes"])) for name, summary in named.items()}
        tests = [summary["test"] for summary in finished]
        sizes = [(len(summary["classes"]), tuple(summary["image_size"])) for summary in finished]
        results.append(
            CellResult(
                dataset=dataset,
                method=group[0].method,
                accuracies=tuple(test["accuracy"] for test in tests),
                interval=tuple(tests[0]["accuracy_interval"]) if tests else (0.0, 1.0),
                num_test=tests[0]["num_images"] if tests else 0,
                seconds=sum(summary["seconds"] for summary in finished),
                num_parameters=num_parameters(group[0].config, *sizes[0]) if finished else 0,
                ssim=tests[0]["ssim"]["mean"] if tests and tests[0]["ssim"] else None,
                failed=tuple(f"{cell.name}: {failures[cell.name]}" for cell in group if cell.name in failures),
                at_chance=tuple(f"{name}: {error}" for name, error in errors.items() if error is not None),
            )
        )
    return results


def deviations_from_paper(grid: Sequence[GridCell], summaries: dict[str, dict[str, Any]]) -> list[str]:
    """Sentences on each setting that differs from the paper's experiment, and the warnings of all runs."""
    from raypp.protections import PROTECTIONS

    sentences = []
    for dataset in dict.fromkeys(cell.dataset for cell in grid):
        cells = [cell for cell in grid if cell.dataset == dataset]
        paper = paper_name(dataset)
        if paper is None:
            sentences.append(f"{dataset}: the paper has no experiment on these images; its values are not comparable")
        else:
            theirs = flatten_dict(validate(load_tree(paper)).model_dump(mode="json"))
            ours = flatten_dict(cells[0].base.model_dump(mode="json"))
            for key in sorted(ours.keys() | theirs.keys()):
                compared = key.startswith(COMPARED) and not key.startswith(NOT_COMPARED)
                if compared and ours.get(key) != theirs.get(key):
                    our_value, their_value = _format(ours.get(key)), _format(theirs.get(key))
                    sentences.append(f"{dataset}: {key} is {our_value}; the paper's experiment has {their_value}")
        for cell in cells:
            sentences += [f"{dataset}: {warning}" for warning in summaries.get(cell.name, {}).get("warnings", [])]
    if any(PROTECTIONS.get(c.config.protection.name).needs_key(c.config.protection) for c in grid):
        sentences.append("every run of a keyed scheme generates a new key, so equal seeds give different results")
    sentences += [cell.method.note for cell in grid if cell.method.note]
    sentences.append("accuracy is measured after 8-bit rounding; the authors' later code measures it in float")
    return list(dict.fromkeys(sentences))


def write_table(storage: Storage, results: Sequence[CellResult], notes: Sequence[str]) -> None:
    """Write ``table1.csv``, ``table1.md`` and ``table1.png`` into the table's folder."""
    storage.write("table1.csv", _csv(results))
    storage.write("table1.md", markdown(results, notes).encode())
    storage.write("table1.png", figure(results))


def _csv(results: Sequence[CellResult]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    for r in results:
        row: list[Any] = [r.dataset, r.method.name, None if r.paper is None else r.paper / 100]
        if r.accuracies:
            row += [r.mean, r.spread, len(r.accuracies), r.num_test, *r.interval]
            row += [r.ssim, r.num_parameters, round(r.seconds, 1)]
        writer.writerow(row)
    return text.getvalue().encode()


def markdown(results: Sequence[CellResult], notes: Sequence[str]) -> str:
    """The table as Markdown, followed by failures and notes."""
    lines = ["# Table I", ""]
    for dataset in dict.fromkeys(r.dataset for r in results):
        lines += [
            f"## {dataset}",
            "",
            "| method | paper | ours, after 8-bit rounding | seeds | SSIM to plain | parameters | minutes |",
            "|---|---|---|---|---|---|---|",
        ]
        for r in (r for r in results if r.dataset == dataset):
            paper = "-" if r.paper is None else f"{r.paper:.2f}%"
            ssim = "-" if r.ssim is None else f"{r.ssim:.3f}"
            cells = [r.method.label, paper, _format_accuracy(r), str(len(r.accuracies)), ssim]
            cells += [f"{r.num_parameters:,}", f"{r.seconds / 60:.1f}"] if r.accuracies else ["-", "-"]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    lines += [
        "Brackets: 95% interval over test images of a single seed. ±: standard deviation over seeds. "
        "Minutes: training and validation, summed over seeds, with one worker per run.",
        "",
    ]
    lines += [f'<p style="color: red"><strong>Error: {error}.</strong></p>\n' for r in results for error in r.at_chance]
    failed = [sentence for r in results for sentence in r.failed]
    if failed:
        lines += ["## Runs that failed", "", *(f"- {sentence}" for sentence in failed), ""]
    lines += ["## Deviations from the paper", "", *(f"- {note}" for note in notes), ""]
    return "\n".join(lines)


@styled
def figure(results: Sequence[CellResult]) -> bytes:
    """The table as a PNG: a panel per data set, with the paper's accuracies and ours."""
    datasets = list(dict.fromkeys(r.dataset for r in results))
    num_rows = max(sum(r.dataset == d for r in results) for d in datasets)
    canvas, panels = new_figure(3 + 5.5 * len(datasets), 1.6 + 0.42 * num_rows, len(datasets))
    for panel, dataset in zip(panels, datasets, strict=True):
        rows = [r for r in results if r.dataset == dataset]
        for y, r in enumerate(rows):
            if r.paper is not None:
                panel.plot(r.paper, y, "D", color="#8a8a8a", ms=7, label="paper", zorder=2)
            if r.accuracies:
                low, high = (r.mean - r.spread, r.mean + r.spread) if r.spread is not None else r.interval
                panel.hlines(y, 100 * low, 100 * high, color="#1f6fb2", lw=2.5)
                x = 100 * r.mean
                panel.plot(x, y, "o", color="#1f6fb2", ms=8, label="ours", zorder=3)
                label = f"{x:.1f}{', at chance' if r.at_chance else ''}"
                align = "center" if x > 10 else "left"  # a centered label would cross the axis
                panel.annotate(label, (x, y), (0, 7), textcoords="offset points", ha=align, fontsize=8)
        panel.set_yticks(range(len(rows)), [r.method.label for r in rows])
        panel.set(ylim=(len(rows) - 0.5, -0.7), xlim=(0, 100), xlabel="test accuracy, %", title=dataset)
        panel.grid(visible=False, axis="y")
    entries = [panel.get_legend_handles_labels() for panel in panels]
    legend = {label: handle for handles, labels in entries for handle, label in zip(handles, labels, strict=True)}
    canvas.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=2)
    return as_png(canvas)


def _format_accuracy(result: CellResult) -> str:
    if not result.accuracies:
        return "failed" if result.failed else "not run"
    mark = ", at chance" if result.at_chance else ""
    if result.spread is not None:
        return f"{result.mean:.2%} ± {100 * result.spread:.2f}{mark}"
    low, high = result.interval
    return f"{result.mean:.2%} ({100 * low:.1f} to {100 * high:.1f}){mark}"


def _format(value: Any) -> str:
    if isinstance(value, str) and value.startswith("/"):
        return Path(value).name  # the folder on this machine means nothing to a reader
    return "absent" if value is None else str(value)
