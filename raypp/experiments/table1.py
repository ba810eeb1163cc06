"""Table I of the paper as a grid of runs: which cells there are, and the table, figure and notes made of their results.

NAME/cells/DATASET-METHOD-seedN/   a run each
NAME/table1.csv, table1.md, table1.png
"""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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


@contextmanager
def open_table(storage: Storage, name: str, *, resume: bool) -> Iterator[Storage]:
    """Take a table's folder and hold its lock; without ``resume`` it must be new.

    Raises:
        StorageError: the name is taken or in use, or with ``resume`` unknown.
    """
    folder = storage.folder(validate_name(name))
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


def _begun(config: Config, name: str) -> bool:
    """Whether a cell has something to go on from."""
    folder = Storage(config.cluster.storage).folder(name)
    return folder.exists("summary.json") or bool(list_checkpoints(folder))


def train_cell(config: Config, name: str, display: ProgressListener) -> dict[str, Any]:
    """Train one cell in this process, from its newest checkpoint if it has begun; returns its summary."""
    with open_run(config, name, resume=_begun(config, name)) as run:
        for warning in run.warnings:
            display.warn(warning)
        return summary(run) or train_locally(run, display)


def run_cells_locally(
    grid: Sequence[GridCell], display: MultiProgressDisplay, ended: Callable[[GridCell, dict[str, Any]], None]
) -> None:
    """Train every cell in this process, one after the other; ``ended`` as for ``raypp.cluster.table1.run_on_ray``.

    Raises:
        ToldToStop: by ``display`` or SIGTERM, after a checkpoint.
    """
    with stop_on_signal(display.stop, signal.SIGTERM):
        for cell in grid:
            display.raise_if_stop_requested()
            try:
                outcome: dict[str, Any] = {"result": train_cell(cell.config, cell.name, display.of(cell.name))}
            except RayppError as error:
                outcome = {"error": str(error)}
            ended(cell, outcome)


def _finished_before(
    datasets: Sequence[str], chosen: Sequence[str], seeds: Sequence[int], flags: Sequence[str], folder: Storage
) -> list[tuple[GridCell, dict[str, Any]]]:
    """Finished cells of a table, trained with the same settings, that the command does not ask for."""
    stems = {Path(dataset).stem: dataset for dataset in datasets}
    found = []
    for name in folder.folder(CELLS).folders():
        match = re.fullmatch(r"(.+)-seed(\d+)", name)
        row = match[1] if match else ""
        for stem, dataset in stems.items():
            method, seed = row.removeprefix(f"{stem}-"), int(match[2]) if match else 0
            asked = method in chosen and seed in seeds
            if row == f"{stem}-{method}" and method in table_rows() and not asked:
                (cell,) = grid_cells([dataset], [method], [seed], flags, folder)
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
    run: Callable[[Sequence[GridCell], MultiProgressDisplay, Callable[[GridCell, dict[str, Any]], None]], None],
) -> list[CellResult]:
    """Train what is missing of the grid and write the table after every cell.

    Args:
        run: trains cells and tells of each how it ended: :func:`run_locally`, or Ray's.

    Raises:
        RayppError: the grid or the folder is not allowed; a cell that fails does not stop the others.
    """
    root = Storage(storage)
    grid = grid_cells(datasets, chosen, seeds, flags, root.folder(validate_name(name)))
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
        order = list(table_rows())
        whole = sorted([*grid, *(cell for cell, _ in earlier)], key=lambda c: (c.dataset, order.index(c.method.name)))

        def write() -> list[CellResult]:
            results = collect(whole, summaries, failures)
            write_table(folder, results, deviations_from_paper(whole, summaries))
            return results

        with MultiProgressDisplay(len(grid), len(grid) - len(missing), quiet=quiet) as display:

            def ended(cell: GridCell, outcome: dict[str, Any]) -> None:
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
