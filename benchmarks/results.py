"""The tables and figures of docs/results/, from the CSV files in docs/results/data/.

    python benchmarks/results.py            # rewrite the tables, and draw the figures in docs/images as SVG and PNG
    python benchmarks/results.py --check    # write nothing; exit 1 if a page or a figure is stale

A page shows a table between the lines ``<!-- table: NAME -->`` and ``<!-- end -->``. Its numbers stand in NAME.csv, one
observation per row, units in the column names. Titles, formats and bold cells stand in tables.yaml, in the same folder.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from raypp.evaluation.output import STYLE

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
DATA = RESULTS / "data"
IMAGES = ROOT / "docs" / "images"
BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", flags=re.DOTALL)
MISSING = "-"
NEUTRAL = "#444444"

Row = dict[str, str]
Interval = tuple[list[float], list[float]]
"""Distances from each value down to its lower end and up to its upper end."""


@dataclass(frozen=True)
class Column:
    """One column of a Markdown table; the fields are described in tables.yaml."""

    title: str
    value: str
    format: str = ""
    unit: str = ""
    low: str = ""
    high: str = ""
    interval_format: str = ""
    lower_bound: str = ""
    bold: bool = False

    @property
    def csv_columns(self) -> set[str]:
        return {name for name in (self.value, self.low, self.high, self.lower_bound) if name}

    def render(self, row: Row) -> str:
        """Return the cell of ``row``: value, unit and interval."""
        text = row[self.value]
        if not text:
            return MISSING
        if not self.format:
            return text
        prefix = "≥ " if self.lower_bound and row[self.lower_bound] == "yes" else ""
        return f"{prefix}{format_number(text, self.format)}{self.unit}{self._interval(row)}"

    def _interval(self, row: Row) -> str:
        """`` (a to b)``, `` (up to b)`` where only the upper end is known, or an empty string."""
        low, high = (row[name] if name else "" for name in (self.low, self.high))
        style = self.interval_format or self.format
        if not high:
            return ""
        if not low:
            return f" (up to {format_number(high, style)})"
        return f" ({format_number(low, style)} to {format_number(high, style)})"


def format_number(text: str, style: str) -> str:
    """Format a number of a CSV file; the style ``text`` leaves it as it stands there."""
    return text if style == "text" else f"{float(text):{style}}"


@dataclass(frozen=True)
class Table:
    """The columns of one Markdown table, and the rows that are bold."""

    columns: tuple[Column, ...]
    bold_rows: frozenset[str] = frozenset()


def load_tables() -> dict[str, Table]:
    """Read tables.yaml."""
    specifications = yaml.safe_load((DATA / "tables.yaml").read_text(encoding="utf-8"))
    return {
        name: Table(tuple(Column(**column) for column in table["columns"]), frozenset(table.get("bold_rows", ())))
        for name, table in specifications.items()
    }


def load_rows(name: str) -> list[Row]:
    """Read the rows of NAME.csv; every value is text."""
    path = DATA / f"{name}.csv"
    if not path.exists():
        raise SystemExit(f"{path.relative_to(ROOT)} is missing; a page shows the table {name!r}")
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def render_table(name: str, tables: dict[str, Table]) -> str:
    """Return the table ``name`` as Markdown, with a line break at its end."""
    if name not in tables:
        raise SystemExit(f"tables.yaml has no table {name!r}; it has {', '.join(tables)}")
    table, rows = tables[name], load_rows(name)
    absent = {csv_column for column in table.columns for csv_column in column.csv_columns} - set(rows[0])
    if absent:
        raise SystemExit(f"{name}.csv has no column {', '.join(sorted(absent))}, which tables.yaml names")
    lines = [[column.title for column in table.columns], ["---"] * len(table.columns)]
    lines += [render_row(table, row) for row in rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def render_row(table: Table, row: Row) -> list[str]:
    """Return the cells of one row; the row is bold if the value of its first CSV column is in ``bold_rows``."""
    is_bold = next(iter(row.values())) in table.bold_rows
    cells = [(column, column.render(row)) for column in table.columns]
    return [f"**{cell}**" if is_bold and column.bold and cell != MISSING else cell for column, cell in cells]


def render_page(text: str, tables: dict[str, Table]) -> str:
    """Return a page with its tables made from the CSV files."""
    return BLOCK.sub(lambda match: f"{match[1]}\n{render_table(match[2], tables)}\n{match[3]}", text)


def numbers(rows: list[Row], column: str) -> list[float]:
    """The values of a numeric column."""
    return [float(row[column]) for row in rows]


def error_bars(rows: list[Row], value: str, low: str, high: str) -> Interval:
    """Lengths of the error bars below and above each value; 0 where the CSV file has no interval."""
    below = [float(row[value]) - float(row[low] or row[value]) for row in rows]
    above = [float(row[high] or row[value]) - float(row[value]) for row in rows]
    return below, above


def draw_table1() -> Any:
    """Draw the accuracies of Table I, the paper's and raypp's, sorted by raypp's."""
    from matplotlib.figure import Figure

    rows = sorted(load_rows("table1"), key=lambda row: float(row["accuracy_percent"]))
    ours, theirs = rows[0]["epochs"], rows[0]["paper_epochs"]
    figure = Figure(figsize=(7.0, 5.4))
    axes = figure.subplots()
    accuracies = numbers(rows, "accuracy_percent")
    bars = error_bars(rows, "accuracy_percent", "accuracy_low_percent", "accuracy_high_percent")
    label = f"raypp, {ours} epochs: n = 10,000 test images, 95% Wilson interval"
    axes.errorbar(accuracies, range(len(rows)), xerr=bars, fmt="o", label=label, zorder=3)
    published = [(y, row) for y, row in enumerate(rows) if row["paper_accuracy_percent"]]
    heights, published_rows = [y for y, _ in published], [row for _, row in published]
    values = numbers(published_rows, "paper_accuracy_percent")
    axes.plot(values, heights, "D", color="#7a7a7a", label=f"paper, {theirs} epochs")
    for x, y in [*zip(accuracies, range(len(rows)), strict=True), *zip(values, heights, strict=True)]:
        axes.annotate(f"{x:.1f}", (x, y), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=8.5)
    axes.set_yticks(range(len(rows)), [row["figure_label"] for row in rows])
    axes.set(xlim=(70, 100), ylim=(-0.6, len(rows) - 0.3))
    axes.set_xlabel("test accuracy, %")
    axes.set_title(f"Table I on CIFAR-10: {ours} epochs (raypp) against {theirs} (paper)")
    figure.legend(loc="outside lower center", ncols=1)
    return figure


def draw_search() -> Any:
    """Draw the front of a search: leakage against accuracy, by the quick attack and by the full attack."""
    from matplotlib.figure import Figure

    rows = load_rows("search_front")
    attacked = [row for row in rows if row["full_attack_ssim"]]
    baseline = float(rows[0]["baseline_ssim"])
    figure = Figure(figsize=(7.0, 4.6))
    axes = figure.subplots()
    x, y = numbers(rows, "accuracy_percent"), numbers(rows, "leakage_ssim")
    axes.step(x, y, where="pre", lw=1.0, alpha=0.6, zorder=1)
    axes.plot(x, y, "o", color="C0", label="quick attack: mean SSIM", zorder=3)
    x_full, y_full = numbers(attacked, "accuracy_percent"), numbers(attacked, "full_attack_ssim")
    axes.plot(x_full, y_full, "o", color="C0", mfc="white", label="full attack: mean SSIM", zorder=3)
    axes.axhline(baseline, color=NEUTRAL, ls="--", lw=1.3, label=f"baseline fitted class image: {baseline:.3f}")
    for row in rows:
        if row["point"]:
            place = float(row["accuracy_percent"]), float(row["leakage_ssim"])
            offset, align = ((0, -16), "center") if place[0] < 25 else ((-8, 4), "right")
            axes.annotate(row["point"], place, xytext=offset, textcoords="offset points", ha=align, fontsize=8.5)
    axes.set(xlim=(15, 52), ylim=(0, 0.7))
    axes.set_xlabel("validation accuracy after 8-bit rounding, % (better to the right)")
    axes.set_ylabel("leakage, SSIM (better below)")
    axes.set_title("Pareto front of 12 trials by TPE, CIFAR-10 at 16 x 16 pixels, seed 0")
    figure.legend(loc="outside lower center", ncols=3)
    return figure


FIGURES: dict[str, tuple[Callable[[], Any], str]] = {
    "search": (draw_search, "search_front"),
    "table1": (draw_table1, "table1"),
}
"""How each figure is drawn, and the CSV file that it shows."""


def digest(name: str) -> str:
    """The mark of a CSV file's content that a figure carries."""
    return f"docs/results/data/{name}.csv, sha256 {hashlib.sha256((DATA / f'{name}.csv').read_bytes()).hexdigest()}"


def write_figures() -> None:
    """Draw every figure as SVG and PNG."""
    import matplotlib.style

    with matplotlib.style.context(STYLE):
        for name, (draw, data) in FIGURES.items():
            figure = draw()
            for suffix, key in (("svg", "Date"), ("png", "Software")):
                path = IMAGES / f"{name}.{suffix}"
                figure.savefig(path, metadata={"Description": digest(data), key: None})
                print(f"wrote {path.relative_to(ROOT)}")


def stale_figures() -> list[Path]:
    """SVG and PNG files that were drawn from other numbers than those in the CSV files, or are missing."""
    expected = {
        IMAGES / f"{name}.{kind}": digest(data) for name, (_, data) in FIGURES.items() for kind in ("svg", "png")
    }
    return [path for path, mark in expected.items() if not path.exists() or mark.encode() not in path.read_bytes()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page or a figure is stale")
    arguments = parser.parse_args()
    tables = load_tables()
    pages = {path: path.read_text(encoding="utf-8") for path in sorted(RESULTS.glob("*.md"))}
    rendered = {path: render_page(text, tables) for path, text in pages.items()}
    stale = [path for path, text in pages.items() if text != rendered[path]]
    if arguments.check:
        stale += stale_figures()
        for path in stale:
            print(f"{path.relative_to(ROOT)} is stale; run `python benchmarks/results.py`", file=sys.stderr)
        raise SystemExit(1 if stale else 0)
    for path in stale:
        path.write_text(rendered[path], encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")
    write_figures()


if __name__ == "__main__":
    main()
