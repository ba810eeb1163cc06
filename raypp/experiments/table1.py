"""Table I of the paper as a grid of runs: which cells there are, and the table, figure and notes made of their results.

NAME/cells/DATASET-METHOD-seedN/   a run each
NAME/table1.csv, table1.md, table1.png
"""

from __future__ import annotations

import csv
import io
import re
import signal
import statistics
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from raypp.config import Config, check_milestones, flatten, load_tree, merge, parse_flags, presets, validate
from raypp.evaluation.plotting import as_png, new_figure
from raypp.experiments.training_run import (
    checked_name,
    lock,
    open_run,
    refuse_foreign,
    same_configuration,
    stored,
    summary,
    train_locally,
)
from raypp.training.protection_task import check_features
from raypp.training.reporter import newest_first
from raypp.utils.documents import load_yaml
from raypp.utils.errors import ConfigError, RayppError, StorageError
from raypp.utils.progress import GridDisplay, Shows
from raypp.utils.registry import did_you_mean
from raypp.utils.signals import told_by
from raypp.utils.storage import Storage

CELLS = "cells"
MAX_WIDTH = 1024  # of a classifier that is to have as many parameters as the proposed
FILES = ("table1.csv", "table1.md", "table1.png")
# What a departure from the paper may lie in; alpha is what rows differ in.
COMPARED = ("data.", "protection.", "classifier.", "features.", "train.")
# What came of features.fallback is among the runs' warnings.
NOT_COMPARED = ("data.source.root", "features.fallback", "train.alpha", "train.eval_batch_size")
DECIDED = {
    "protection.name": "--methods",
    "train.alpha": "--methods",
    "seed": "--seeds",
    "cluster.storage": "--storage",
}
"""Settings that the grid itself makes, and the options that say how."""


@dataclass(frozen=True)
class Method:
    """A row of the table."""

    name: str
    label: str
    settings: dict[str, Any]
    keep: tuple[str, ...] = ()
    match_parameters: bool = False
    paper: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    dataset: str
    method: Method
    seed: int
    config: Config
    base: Config
    """The data set's preset with the command's settings, before the row's own."""

    @property
    def name(self) -> str:
        return f"{self.dataset}-{self.method.name}-seed{self.seed}"


@dataclass(frozen=True)
class Result:
    """What the runs of one method on one data set gave; accuracies are shares in [0, 1], one per finished seed."""

    dataset: str
    method: Method
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


def methods() -> dict[str, Method]:
    """Every row that the table can have, by name."""
    text = (resources.files("raypp.experiments") / "table1.yaml").read_text(encoding="utf-8")
    return {row["name"]: Method(**(row | {"keep": tuple(row.get("keep", ()))})) for row in load_yaml(text)}


def cells(
    datasets: Sequence[str], chosen: Sequence[str], seeds: Sequence[int], flags: Sequence[str], storage: Storage
) -> list[Cell]:
    """The grid: every data set with every method and seed.

    Args:
        datasets: names of presets, or paths of YAML files.
        chosen: names of methods.
        flags: settings laid over every preset, such as ``("--train.epochs", "3")``.
        storage: the table's folder.

    Raises:
        ConfigError: an unknown data set or method, one named twice, or a setting that is not allowed.
    """
    known = methods()
    for name in chosen:
        if name not in known:
            raise ConfigError(f"unknown method {name!r}{did_you_mean(name, known)}; allowed: {', '.join(known)}")
    for what, given in (("dataset", [Path(d).stem for d in datasets]), ("method", chosen), ("seed", seeds)):
        twice = {str(value) for value in given if list(given).count(value) > 1}
        if twice:
            raise ConfigError(f"{what} {', '.join(sorted(twice))} is given twice")
        if not given:
            raise ConfigError(f"no {what} is given; allowed is one or more")
    decided = flatten(parse_flags(flags))
    for key, option in DECIDED.items():
        if key in decided or (key == "protection.name" and isinstance(decided.get("protection"), str)):
            raise ConfigError(f"--{key} is what the table's grid decides; choose by {option}")
    grid = []
    for dataset in datasets:
        base = load_tree(dataset, flags=tuple(flags))
        proposed = validate(base)
        for name in chosen:
            for seed in seeds:
                config = _configure(base, known[name], seed, storage)
                grid.append(Cell(Path(dataset).stem, known[name], seed, config, proposed))
    return grid


def _configure(base: dict[str, Any], method: Method, seed: int, storage: Storage) -> Config:
    settings = method.settings
    if method.keep:
        kept = {key: base["protection"][key] for key in method.keep if key in base["protection"]}
        settings = merge(settings, {"protection": kept})
    tree = merge(merge(base, settings), {"seed": seed, "cluster": {"storage": storage.folder(CELLS).uri}})
    config = validate(tree)
    check_milestones(config.train, "train")
    if (config.cluster.num_workers or 1) > 1:
        raise ConfigError(
            f"cluster.num_workers is {config.cluster.num_workers}, allowed for table1 is 1: its cells run side by side"
        )
    if method.match_parameters:
        config = validate(merge(tree, {"classifier": {"width": _matching_width(validate(base))}}))
    return config


def num_parameters(config: Config, num_classes: int = 10, image_size: tuple[int, int] = (32, 32)) -> int:
    """Parameters of a configuration's protection and classifier."""
    import torch

    from raypp.models.adaptation import build_classifier
    from raypp.protections import PROTECTIONS

    kind = PROTECTIONS.get(config.protection.name)
    with torch.device("meta"):
        parts = [
            build_classifier(
                config.classifier,
                config.adaptation_name,
                num_classes=num_classes,
                channels=config.data.channels,
                image_size=image_size,
            )
        ]
        if kind.trained:
            parts.append(PROTECTIONS.build(config.protection, channels=config.data.channels))
    return sum(p.numel() for part in parts for p in part.parameters())


def _matching_width(config: Config) -> int:
    """The classifier's width at which it alone has about as many parameters as ``config`` has in all."""
    if "width" not in type(config.classifier).model_fields:
        raise ConfigError(f"method plain-matched needs a classifier with a width; {config.classifier.name} has none")
    wanted = num_parameters(config)
    plain = validate(merge(config.model_dump(mode="json"), {"protection": "plain", "train": {"mode": "plain"}}))

    def num_parameters_of(width: int) -> int:
        options = plain.classifier.model_copy(update={"width": width})
        return num_parameters(plain.model_copy(update={"classifier": options}))

    widths = range(1, MAX_WIDTH)  # the more channels the more parameters: halve the range
    at = bisect_left(widths, 0, key=lambda width: num_parameters_of(width) - wanted)
    return min(widths[max(at - 1, 0) : at + 1], key=lambda width: abs(num_parameters_of(width) - wanted))


@contextmanager
def open_table(storage: Storage, name: str, *, resume: bool) -> Iterator[Storage]:
    """Take a table's folder and hold its lock; without ``resume`` it must be new.

    Raises:
        StorageError: the name is taken or in use, or with ``resume`` unknown.
    """
    folder = storage.folder(checked_name(name))
    there = folder.exists(CELLS)
    if resume and not there:
        raise StorageError(f"there is no table {name!r} to resume under {storage.uri!r}")
    if there and not resume:
        raise StorageError(
            f"table {name!r} exists already in {folder.uri}; --resume goes on with it, another --name starts a new one"
        )
    if not there:
        refuse_foreign(folder, "a table")
    if folder.local:
        try:
            (folder.path / CELLS).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot create {folder.uri}: {error.strerror}") from error
    with lock(folder, f"table {name!r}"):
        yield folder


def stored_summary(cell: Cell) -> dict[str, Any] | None:
    """The results of a finished cell, or None.

    Raises:
        StorageError: it was trained with other settings, or its files are damaged.
    """
    run = Storage(cell.config.cluster.storage).folder(cell.name)
    if not run.exists("summary.json"):
        return None
    kept = stored(run, "config.yaml", "train", "data")
    same_configuration(cell.config, kept, run, cell.name)
    if kept["train"]["epochs"] != cell.config.train.epochs:
        return None
    return stored(run, "summary.json", "test", "seconds", "classes", "image_size")


def collect(
    grid: Iterable[Cell], summaries: dict[str, dict[str, Any]], failures: dict[str, str] | None = None
) -> list[Result]:
    """Put the cells' summaries together, by data set and method, in the grid's order.

    Args:
        summaries: by the cell's name; a cell without one is left out of its row.
        failures: why a cell has none, by its name.
    """
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in grid:
        groups.setdefault((cell.dataset, cell.method.name), []).append(cell)
    results = []
    for (dataset, _), group in groups.items():
        found = [summaries[cell.name] for cell in group if cell.name in summaries]
        tests = [summary["test"] for summary in found]
        similarity = tests[0]["ssim"]["mean"] if tests and tests[0]["ssim"] else None
        failed = [f"{cell.name}: {(failures or {})[cell.name]}" for cell in group if cell.name in (failures or {})]
        results.append(
            Result(
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


def departures(grid: Sequence[Cell], summaries: dict[str, dict[str, Any]]) -> list[str]:
    """What differs from the paper's experiment, as sentences: every setting, and every warning of a run."""
    from raypp.protections import PROTECTIONS

    sentences = []
    for dataset in dict.fromkeys(cell.dataset for cell in grid):
        mine = [cell for cell in grid if cell.dataset == dataset]
        paper = paper_name(dataset)
        if paper is not None:
            theirs = flatten(validate(load_tree(paper)).model_dump(mode="json"))
            ours = flatten(mine[0].base.model_dump(mode="json"))
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


def paper_name(dataset: str) -> str | None:
    """The paper's own experiment that a data set belongs to, by the longest common name; None if it is another."""
    return next((name for name in ("cifar100", "cifar10") if dataset.startswith(name) and name in presets()), None)


def write_table(storage: Storage, results: Sequence[Result], notes: Sequence[str]) -> None:
    """Write ``table1.csv``, ``table1.md`` and ``table1.png`` into the table's folder."""
    storage.write("table1.csv", _csv(results).encode())
    storage.write("table1.md", markdown(results, notes).encode())
    storage.write("table1.png", figure(results))


def _csv(results: Sequence[Result]) -> str:
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


def markdown(results: Sequence[Result], notes: Sequence[str]) -> str:
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


def figure(results: Sequence[Result]) -> bytes:
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


def _ours(result: Result) -> str:
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


def _begun(config: Config, name: str) -> bool:
    """Whether a cell has something to go on from."""
    folder = Storage(config.cluster.storage).folder(name)
    return folder.exists("summary.json") or bool(newest_first(folder))


def train_cell(config: Config, name: str, display: Shows) -> dict[str, Any]:
    """Train one cell in this process, from its newest checkpoint if it has begun; returns its summary."""
    with open_run(config, name, resume=_begun(config, name)) as run:
        for warning in run.warnings:
            display.warn(warning)
        return summary(run) or train_locally(run, display)


def run_locally(grid: Sequence[Cell], display: GridDisplay, ended: Callable[[Cell, dict[str, Any]], None]) -> None:
    """Train every cell in this process, one after the other; ``ended`` as for ``raypp.cluster.table1.run_on_ray``.

    Raises:
        ToldToStop: by ``display`` or SIGTERM, after a checkpoint.
    """
    with told_by(display.stop, signal.SIGTERM):
        for cell in grid:
            display.end_if_told()
            try:
                outcome: dict[str, Any] = {"result": train_cell(cell.config, cell.name, display.of(cell.name))}
            except RayppError as error:
                outcome = {"error": str(error)}
            ended(cell, outcome)


def _finished_before(
    datasets: Sequence[str], chosen: Sequence[str], seeds: Sequence[int], flags: Sequence[str], folder: Storage
) -> list[tuple[Cell, dict[str, Any]]]:
    """Finished cells of a table, trained with the same settings, that the command does not ask for."""
    stems = {Path(dataset).stem: dataset for dataset in datasets}
    found = []
    for name in folder.folder(CELLS).folders():
        match = re.fullmatch(r"(.+)-seed(\d+)", name)
        row = match[1] if match else ""
        for stem, dataset in stems.items():
            method, seed = row.removeprefix(f"{stem}-"), int(match[2]) if match else 0
            asked = method in chosen and seed in seeds
            if row == f"{stem}-{method}" and method in methods() and not asked:
                (cell,) = cells([dataset], [method], [seed], flags, folder)
                summary_before = stored_summary(cell)
                if summary_before is not None:
                    found.append((cell, summary_before))
    return found


def table1(
    datasets: Sequence[str],
    chosen: Sequence[str],
    seeds: Sequence[int],
    flags: Sequence[str],
    *,
    storage: str | Path,
    name: str,
    resume: bool = False,
    quiet: bool = False,
    run: Callable[[Sequence[Cell], GridDisplay, Callable[[Cell, dict[str, Any]], None]], None],
) -> list[Result]:
    """Train what is missing of the grid and write the table after every cell.

    Args:
        run: trains cells and tells of each how it ended: :func:`run_locally`, or Ray's.

    Raises:
        RayppError: the grid or the folder is not allowed; a cell that fails does not stop the others.
    """
    root = Storage(storage)
    grid = cells(datasets, chosen, seeds, flags, root.folder(checked_name(name)))
    check_features(cell.config for cell in grid if not _begun(cell.config, cell.name))
    with open_table(root, name, resume=resume) as folder:
        summaries: dict[str, dict[str, Any]] = {}
        failures: dict[str, str] = {}
        for cell in grid:
            found = stored_summary(cell)
            if found is not None:
                summaries[cell.name] = found
        missing = [cell for cell in grid if cell.name not in summaries]

        # Finished rows that this command does not name stay in the table.
        earlier = _finished_before(datasets, chosen, seeds, flags, root.folder(name)) if resume else []
        for cell, found in earlier:
            summaries[cell.name] = found
        order = list(methods())
        whole = sorted([*grid, *(cell for cell, _ in earlier)], key=lambda c: (c.dataset, order.index(c.method.name)))

        def write() -> list[Result]:
            results = collect(whole, summaries, failures)
            write_table(folder, results, departures(whole, summaries))
            return results

        with GridDisplay(len(grid), len(grid) - len(missing), quiet=quiet) as display:

            def ended(cell: Cell, outcome: dict[str, Any]) -> None:
                if "result" in outcome:
                    summaries[cell.name] = outcome["result"]
                    display.done(cell.name, f"{outcome['result']['test']['accuracy']:.2%}")
                else:
                    failures[cell.name] = outcome["error"]
                    display.done(cell.name, f"failed: {outcome['error']}")
                write()

            if missing:
                run(missing, display, ended)
        return write()
