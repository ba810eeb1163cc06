"""Table I on a cluster: a task per cell, as many at a time as there are CPUs or GPUs for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from raypp.cluster.session import session  # first: it makes the settings that Ray reads when it is imported

import ray  # isort: skip
import torch

from raypp.cluster.board import Board
from raypp.config import Config, validate
from raypp.errors import ConfigError, RayppError
from raypp.progress import GridDisplay, Row
from raypp.table1 import Cell, train_cell

POLL_SECONDS = 0.5

Outcome = dict[str, Any]


class Pinned:
    """Shows one cell's progress on the driver's board."""

    def __init__(self, board: Any, cell: str) -> None:
        self._board, self._cell = board, cell

    def step(self, info: Row) -> None:
        self._board.pin.remote("step", info, self._cell)

    def epoch(self, row: Row) -> None:
        """A run among many shows no epochs."""

    def warn(self, message: str) -> None:
        self._board.pin.remote("warning", message, self._cell)


def run_on_ray(grid: Sequence[Cell], display: GridDisplay, ended: Callable[[Cell, Outcome], None]) -> None:
    """Train every cell; ``ended`` is called with each one's ``{"summary": ...}`` or ``{"error": sentence}``.

    A task whose worker dies is started again and resumes from its newest checkpoint.

    Raises:
        ConfigError: no cell fits into the cluster.
    """
    with session() as have:
        options = _resources(grid[0].config, have)
        task = ray.remote(**options)(_train)
        board = ray.remote(num_cpus=0)(Board).remote()
        waiting = {task.remote(cell.config.model_dump(mode="json"), cell.name, board): cell for cell in grid}
        while waiting:
            ready, _ = ray.wait(list(waiting), num_returns=1, timeout=POLL_SECONDS)
            steps, events = ray.get(board.take.remote())
            for name, step in steps.items():
                display.step(name, step)
            for name, _, message in events:
                display.warn(name, message)
            for reference in ready:
                cell = waiting.pop(reference)
                ended(cell, _outcome(reference))


def _outcome(reference: Any) -> Outcome:
    try:
        found: Outcome = ray.get(reference)
    except ray.exceptions.RayError as error:
        return {"error": f"its worker died too often: {str(error).strip().splitlines()[0]}"}
    return found


def _resources(config: Config, have: dict[str, float]) -> dict[str, Any]:
    """What one cell takes; refused where the cluster can never give it."""
    cluster = config.cluster
    use_gpu = have.get("GPU", 0) > 0 if cluster.gpu is None else cluster.gpu
    for kind, num in {"CPU": cluster.cpus_per_worker, "GPU": float(use_gpu)}.items():
        if num > have.get(kind, 0):
            raise ConfigError(
                f"a cell needs {num:g} {kind}s, the cluster has {have.get(kind, 0):g}; see cluster.cpus_per_worker and "
                "cluster.gpu"
            )
    return {
        "num_cpus": cluster.cpus_per_worker,
        "num_gpus": int(use_gpu),
        "max_retries": cluster.max_failures,
        "max_calls": 1,  # a process per cell: one cell's memory and settings are not the next one's
    }


def _train(tree: dict[str, Any], name: str, board: Any) -> Outcome:
    config = validate(tree)
    torch.set_num_threads(max(1, int(config.cluster.cpus_per_worker)))
    try:
        return {"summary": train_cell(config, name, Pinned(board, name))}
    except RayppError as error:
        return {"error": str(error)}
