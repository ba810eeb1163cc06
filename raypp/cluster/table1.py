"""Table I on a cluster: each cell of the grid is a task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from raypp.cluster.tasks import Outcome, run_tasks
from raypp.config.validation import validate
from raypp.experiments.table1 import train_cell
from raypp.experiments.table1_grid import GridCell
from raypp.utils.progress import MultiProgressDisplay, ProgressListener


def run_on_ray(
    grid: Sequence[GridCell], display: MultiProgressDisplay, on_done: Callable[[GridCell, Outcome], None]
) -> None:
    """Train every cell; a cell whose worker dies resumes from its newest checkpoint.

    Args:
        on_done: called with each cell and its ``{"result": summary}`` or ``{"error": sentence}``.

    Raises:
        ConfigError: no cell fits into a cluster that cannot grow.
        TrainingInterrupted: by ``display`` or SIGTERM, after checkpoints of the running cells.
    """
    cells = {cell.name: cell for cell in grid}
    work = {name: (cell.config.model_dump(mode="json"), name) for name, cell in cells.items()}

    def done(name: str, outcome: Outcome) -> None:
        on_done(cells[name], outcome)

    run_tasks(_train, work, grid[0].config.cluster, display, done, what="a cell")


def _train(tree: dict[str, Any], name: str, display: ProgressListener) -> dict[str, Any]:
    return train_cell(validate(tree), name, display)
