"""Independent pieces of work side by side on a cluster: Table I's cells, the ladder's attacks."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

import ray
import torch

from raypp.cluster.progress_actor import create_progress_actor, drain, shutdown_grace_period, stop_requested
from raypp.cluster.session import insufficient_resources, ray_session, uses_gpu
from raypp.config.schema import Cluster
from raypp.utils.errors import RayppError, TrainingInterrupted, first_line
from raypp.utils.progress import MultiProgressDisplay, Row
from raypp.utils.signals import stop_on_signal

POLL_SECONDS = 0.5

Outcome = dict[str, Any]


class RemoteProgress:
    """Shows the progress of one piece of work on the driver's board."""

    def __init__(self, board: Any, work: str) -> None:
        self._board, self._work = board, work

    def step(self, info: Row) -> None:
        self._board.pin.remote("step", info, self._work)

    def epoch(self, row: Row) -> None:
        """One among many shows no epochs."""

    def warn(self, message: str) -> None:
        self._board.pin.remote("warning", message, self._work)

    def should_stop(self) -> bool:
        return stop_requested(self._board)


def run_tasks(
    function: Callable[..., Any],
    work: Mapping[str, tuple[Any, ...]],
    cluster: Cluster,
    display: MultiProgressDisplay,
    ended: Callable[[str, Outcome], None],
    *,
    what: str,
    after: Mapping[str, Collection[str]] | None = None,
) -> None:
    """Call ``function(*arguments, display)`` for every piece of work, as many at a time as there is room for.

    A task whose worker dies is started again: the function has to go on from where it was.

    Args:
        work: arguments by name.
        cluster: what one piece takes.
        ended: told of each how it ended: ``{"result": ...}`` or ``{"error": sentence}``.
        what: what a piece of work is called in a message.
        after: pieces that have to end before another begins.

    Raises:
        ConfigError: none fits into a cluster that cannot grow.
        ToldToStop: by ``display`` or SIGTERM, when the pieces under way have written checkpoints or taken too long.
    """
    after = after or {}
    # After the session, for Ray's start takes the signal to itself.
    with ray_session() as have, stop_on_signal(display.stop, signal.SIGTERM):
        task = ray.remote(
            **task_resources(cluster, have, what, display),
            max_retries=cluster.max_failures,
            max_calls=1,  # a process each: one's memory and settings are not the next one's
        )(_call)
        board = create_progress_actor()
        waiting, open_ = dict(work), set(work)
        running: dict[Any, str] = {}
        until: float | None = None  # when to give up those that were told to stop
        left = False  # whether something is
        while open_:
            if until is None and display.stop.is_set():
                board.stop.remote()
                until = time.monotonic() + shutdown_grace_period()
                left = bool(waiting)
                open_ -= waiting.keys()
                waiting.clear()
            if until is not None and time.monotonic() > until:
                left = True
                break
            for name in [n for n in waiting if not open_ & set(after.get(n, ()))]:
                arguments = waiting.pop(name)
                running[task.remote(function, arguments, name, board, cluster.cpus_per_worker)] = name
            ready, _ = ray.wait(list(running), num_returns=1, timeout=POLL_SECONDS)
            steps, events = drain(board)
            for name, step in steps.items():
                display.step(name, step)
            for name, _, message in events:
                display.warn(name, message)
            for reference in ready:
                name = running.pop(reference)
                open_.remove(name)
                outcome = _outcome(reference)
                if "told" in outcome:
                    left = True
                else:
                    ended(name, outcome)
        if left:
            display.raise_if_stop_requested()


def _outcome(reference: Any) -> Outcome:
    try:
        found: Outcome = ray.get(reference)
    except ray.exceptions.RayTaskError as error:  # what it raised is none of ours
        cause = error.cause or error
        return {"error": f"it failed: {type(cause).__name__}: {' '.join(str(cause).split())}"}
    except ray.exceptions.RayError as error:
        return {"error": f"its worker died too often: {first_line(error)}"}
    return found


def task_resources(
    cluster: Cluster, have: dict[str, float], what: str, display: MultiProgressDisplay, num: int = 1
) -> dict[str, float]:
    """What one of ``num`` pieces takes that run at once; where the cluster does not have it, says that it waits.

    Raises:
        ConfigError: the cluster cannot grow.
    """
    use_gpu = uses_gpu(cluster, have)
    for kind, each in {"CPU": cluster.cpus_per_worker, "GPU": float(use_gpu)}.items():
        if num * each > have.get(kind, 0):
            sentence = f"{what} needs {num * each:g} {kind}s, the cluster has {have.get(kind, 0):g}"
            display.warn(
                "cluster",
                insufficient_resources(sentence, "cluster.num_workers, cluster.cpus_per_worker and cluster.gpu"),
            )
    return {"num_cpus": cluster.cpus_per_worker, "num_gpus": int(use_gpu)}


def _call(function: Callable[..., Any], arguments: tuple[Any, ...], name: str, board: Any, cpus: float) -> Outcome:
    torch.set_num_threads(max(1, int(cpus)))
    if stop_requested(board):  # while it waited for a place
        return {"told": "not begun"}
    try:
        return {"result": function(*arguments, RemoteProgress(board, name))}
    except RayppError as error:
        return {"error": str(error)}
    except TrainingInterrupted as told:
        return {"told": str(told)}
