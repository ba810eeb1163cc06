"""Table I of the paper as a grid of runs: train the cells, and write table, figure and notes.

NAME/cells/DATASET-METHOD-seedN/   one run per cell
NAME/table1.csv, table1.md, table1.png
"""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

from raypp.config.overrides import Settings
from raypp.config.schema import Config
from raypp.experiments.run_folder import lock, refuse_foreign, validate_name
from raypp.experiments.table1_grid import CELLS, GridCell, grid_cells, table_rows
from raypp.experiments.table1_results import CellResult, collect, deviations_from_paper, stored_summary, write_table
from raypp.experiments.training_run import open_run, summary, train_locally
from raypp.training.checkpoint import list_checkpoints
from raypp.training.protection_task import check_features
from raypp.utils.errors import RayppError, StorageError
from raypp.utils.progress import MultiProgressDisplay, ProgressListener
from raypp.utils.signals import stop_on_signal
from raypp.utils.storage import Storage

OnDone = Callable[[GridCell, dict[str, Any]], None]
"""Receives a cell that ended, with ``{"result": summary}`` or ``{"error": message}``."""


@contextmanager
def open_table(storage: Storage, name: str, *, resume: bool) -> Iterator[Storage]:
    """Create or open a table's folder and hold its lock.

    Raises:
        StorageError: the name is in use; it exists already, or with ``resume`` it does not exist.
    """
    folder = storage.folder(validate_name(name))
    exists = folder.exists(CELLS)
    if resume and not exists:
        raise StorageError(f"there is no table {name!r} to resume under {storage.uri!r}")
    if exists and not resume:
        raise StorageError(
            f"table {name!r} exists already in {folder.uri}; --resume continues it, another --name starts a new one"
        )
    if not exists:
        refuse_foreign(folder, "a table")
    folder.folder(CELLS).create()
    with lock(folder, f"table {name!r}"):
        yield folder


def _is_resumable(config: Config, name: str) -> bool:
    folder = Storage(config.cluster.storage).folder(name)
    return folder.exists("summary.json") or bool(list_checkpoints(folder))


def train_cell(config: Config, name: str, display: ProgressListener) -> dict[str, Any]:
    """Train one cell in this process, or resume it; returns its summary."""
    with open_run(config, name, resume=_is_resumable(config, name)) as run:
        for warning in run.warnings:
            display.warn(warning)
        return summary(run) or train_locally(run, display)


def run_cells_locally(grid: Sequence[GridCell], display: MultiProgressDisplay, on_done: OnDone) -> None:
    """Train every cell in this process, one after the other.

    Raises:
        TrainingInterrupted: a stop was requested by ``display`` or SIGTERM, and a checkpoint is saved.
    """
    with stop_on_signal(display.stop, signal.SIGTERM):
        for cell in grid:
            display.raise_if_stop_requested()
            try:
                outcome: dict[str, Any] = {"result": train_cell(cell.config, cell.name, display.of(cell.name))}
            except RayppError as error:
                outcome = {"error": str(error)}
            on_done(cell, outcome)


def table1(
    datasets: Sequence[str],
    methods: Sequence[str],
    seeds: Sequence[int],
    flags: Settings,
    *,
    storage: str | Path,
    name: str,
    resume: bool = False,
    quiet: bool = False,
    run: Callable[[Sequence[GridCell], MultiProgressDisplay, OnDone], None],
) -> list[CellResult]:
    """Train the cells of the grid that have no result yet, and write the table after every cell.

    Args:
        run: trains cells, with the signature of :func:`run_cells_locally`.

    Raises:
        RayppError: grid or folder is invalid. A cell that fails does not stop the others.
    """
    root = Storage(storage)
    grid = grid_cells(datasets, methods, seeds, flags, root.folder(validate_name(name)))
    check_features(cell.config for cell in grid if not _is_resumable(cell.config, cell.name))
    with open_table(root, name, resume=resume) as folder:
        failures: dict[str, str] = {}
        summaries = {cell.name: results for cell in grid if (results := stored_summary(cell)) is not None}
        missing = [cell for cell in grid if cell.name not in summaries]

        # Finished rows that this command does not name stay in the table.
        earlier = _earlier_cells(datasets, methods, seeds, flags, root.folder(name)) if resume else []
        summaries |= {cell.name: results for cell, results in earlier}
        row_order = list(table_rows())
        cells = sorted(
            [*grid, *(cell for cell, _ in earlier)], key=lambda cell: (cell.dataset, row_order.index(cell.method.name))
        )

        def write() -> list[CellResult]:
            results = collect(cells, summaries, failures)
            write_table(folder, results, deviations_from_paper(cells, summaries))
            return results

        with MultiProgressDisplay(len(grid), len(grid) - len(missing), quiet=quiet) as display:

            def on_done(cell: GridCell, outcome: dict[str, Any]) -> None:
                if "error" in outcome:
                    failures[cell.name] = outcome["error"]
                    display.done(cell.name, f"failed: {outcome['error']}")
                else:
                    summaries[cell.name] = outcome["result"]
                    display.done(cell.name, f"{outcome['result']['test']['accuracy']:.2%}")
                write()

            if missing:
                run(missing, display, on_done)
        return write()


def _earlier_cells(
    datasets: Sequence[str], methods: Sequence[str], seeds: Sequence[int], flags: Settings, folder: Storage
) -> list[tuple[GridCell, dict[str, Any]]]:
    """Finished cells in a table's folder with the same settings that are not in the command's grid."""
    cells = []
    for dataset, method, name in product(datasets, table_rows(), folder.folder(CELLS).folders()):
        match = re.fullmatch(re.escape(f"{Path(dataset).stem}-{method}-seed") + r"(\d+)", name)
        if match and not (method in methods and int(match[1]) in seeds):
            (cell,) = grid_cells([dataset], [method], [int(match[1])], flags, folder)
            if (results := stored_summary(cell)) is not None:
                cells.append((cell, results))
    return cells
