"""Table I on a cluster: a task per cell, as many at a time as there are CPUs or GPUs for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from raypp.cluster.tasks import Outcome, run_tasks
from raypp.config.validation import validate
from raypp.experiments.table1 import train_cell
from raypp.experiments.table1_grid import GridCell
from raypp.utils.progress import MultiProgressDisplay, ProgressListener


def run_on_ray(
    grid: Sequence[GridCell], display: MultiProgressDisplay, ended: Callable[[GridCell, Outcome], None]
) -> None:
    """Train every cell; ``ended`` is called with each one's ``{"result": summary}`` or ``{"error": sentence}``.

    A task whose worker dies is started again and resumes from its newest checkpoint.

    Raises:
        ConfigError: no cell fits into a cluster that cannot grow.
        ToldToStop: by ``display`` or SIGTERM, once the cells under way have written checkpoints.
    """
    cells = {cell.name: cell for cell in grid}
    work = {name: (cell.config.model_dump(mode="json"), name) for name, cell in cells.items()}
    run_tasks(
        _train, work, grid[0].config.cluster, display, lambda name, outcome: ended(cells[name], outcome), what="a cell"
    )


def _train(tree: dict[str, Any], name: str, display: ProgressListener) -> dict[str, Any]:
    return train_cell(validate(tree), name, display)
