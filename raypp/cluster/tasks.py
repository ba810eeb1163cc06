"""Independent tasks in parallel on a cluster: the cells of Table I, and by :mod:`raypp.cluster.attack` attacks."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import ray
import torch

from raypp.cluster.progress_actor import RemoteProgress, create_progress_actor, relay, shutdown_grace_period
from raypp.cluster.session import check_resources, ray_session, uses_gpu
from raypp.cluster.waiting import ResourceNotice, SubmittedParts
from raypp.config.schema import Cluster
from raypp.config.validation import validate
from raypp.experiments.table1 import train_cell
from raypp.experiments.table1_grid import GridCell
from raypp.utils.errors import RayppError, TrainingInterrupted, first_line
from raypp.utils.progress import MultiProgressDisplay, ProgressListener
from raypp.utils.signals import stop_on_signal

POLL_SECONDS = 0.5

Work = Mapping[str, tuple[Any, ...]]
"""Arguments by task."""

Outcome = dict[str, Any]
"""``{"result": ...}``, ``{"error": sentence, "exit_code": ...}`` or ``{"interrupted": sentence}``."""


def run_tasks(
    function: Callable[..., Any],
    work: Work,
    cluster: Cluster,
    display: MultiProgressDisplay,
    on_done: Callable[[str, Outcome], None],
    *,
    what: str,
    after: Mapping[str, Collection[str]] | None = None,
) -> None:
    """Call ``function(*arguments, display)`` for every task, as many at a time as the cluster has room for.

    Ray restarts a task whose worker dies, so the function has to resume from its last checkpoint.

    Args:
        cluster: resources of one task.
        on_done: called with each task and its ``{"result": ...}`` or ``{"error": sentence}``.
        what: a task's name in messages, such as "an attack".
        after: tasks that have to end before another one starts.

    Raises:
        ConfigError: no task fits into a cluster that cannot grow.
        TrainingInterrupted: by ``display`` or SIGTERM, after checkpoints or the grace period.
    """
    # ray_session comes first: Ray's start replaces the handler of the signal.
    with ray_session() as resources, stop_on_signal(display.stop, signal.SIGTERM):
        num_cpus, num_gpus = cluster.cpus_per_worker, int(uses_gpu(cluster, resources))
        check_resources(f"{what} needs", num_cpus, num_gpus, resources, display.of("cluster"))
        remote_call = ray.remote(
            num_cpus=num_cpus,
            num_gpus=num_gpus,
            max_retries=cluster.max_failures,
            max_calls=1,  # a new process per task, without the memory and settings of the last one
        )(_call)
        actor = create_progress_actor()
        submit = partial(remote_call.remote, function, num_cpus, actor)
        required, parts = {"CPU": num_cpus, "GPU": num_gpus}, SubmittedParts()
        notice = ResourceNotice(what, required, cluster.notice_seconds, parts.all_wait, display.of("cluster").warn)
        if not _run_until_done(submit, work, after or {}, actor, display, on_done, parts, notice):
            display.raise_if_stop_requested()


def train_cells(
    grid: Sequence[GridCell], display: MultiProgressDisplay, on_done: Callable[[GridCell, Outcome], None]
) -> None:
    """Train the cells of Table I; a cell whose worker dies resumes from its newest checkpoint.

    Args:
        on_done: called with each cell and its ``{"result": summary}`` or ``{"error": sentence}``.

    Raises:
        ConfigError, TrainingInterrupted: as :func:`run_tasks`.
    """
    cells = {cell.name: cell for cell in grid}
    work = {cell.name: (cell.config.model_dump(mode="json"), cell.name) for cell in grid}
    cluster = grid[0].config.cluster
    run_tasks(_train_cell, work, cluster, display, lambda name, outcome: on_done(cells[name], outcome), what="a cell")


def _train_cell(tree: dict[str, Any], name: str, display: ProgressListener) -> dict[str, Any]:
    return train_cell(validate(tree), name, display)


def _run_until_done(
    submit: Callable[[str, tuple[Any, ...]], Any],
    work: Work,
    after: Mapping[str, Collection[str]],
    actor: Any,
    display: MultiProgressDisplay,
    on_done: Callable[[str, Outcome], None],
    parts: SubmittedParts,
    notice: ResourceNotice,
) -> bool:
    """Run tasks until all have ended or a stop was requested; return whether all have ended."""
    pending = dict(work)
    running: dict[Any, str] = {}
    deadline: float | None = None  # of running tasks, after a stop request
    all_done = True
    while pending or running:
        if deadline is None and display.stop.is_set():
            actor.request_stop.remote()
            deadline = time.monotonic() + shutdown_grace_period()
            all_done = not pending
            pending.clear()
        if deadline is not None and time.monotonic() > deadline:
            return False
        unfinished = {*pending, *running.values()}
        for name in [name for name in pending if not unfinished.intersection(after.get(name, ()))]:
            running[submit(name, pending.pop(name))] = name
            parts.submit(name)
        ready, _ = ray.wait(list(running), num_returns=1, timeout=POLL_SECONDS)
        relay(actor, display.of, parts)
        notice.check()
        for reference in ready:
            name, outcome = running.pop(reference), _outcome(reference)
            parts.end(name)
            if "interrupted" in outcome:
                all_done = False
            else:
                on_done(name, outcome)
    return all_done


def _outcome(reference: Any) -> Outcome:
    try:
        outcome: Outcome = ray.get(reference)
    except ray.exceptions.RayTaskError as error:  # not a RayppError
        cause = error.cause or error
        return {"error": f"it failed: {type(cause).__name__}: {' '.join(str(cause).split())}"}
    except ray.exceptions.RayError as error:
        return {"error": f"its worker died too often: {first_line(error)}"}
    return outcome


def _call(function: Callable[..., Any], cpus: float, actor: Any, name: str, arguments: tuple[Any, ...]) -> Outcome:
    torch.set_num_threads(max(1, int(cpus)))
    progress = RemoteProgress(actor, name)
    progress.started()
    if progress.should_stop():  # while the task waited for resources
        return {"interrupted": "not started"}
    return outcome_of(lambda: function(*arguments, progress), RayppError)


def outcome_of(function: Callable[[], Any], errors: type[RayppError]) -> Outcome:
    """Call ``function`` in a worker, and return ``errors``, which a restart would repeat, instead of raising them."""
    try:
        return {"result": function()}
    except errors as error:
        return {"error": str(error), "exit_code": error.exit_code}
    except TrainingInterrupted as interrupt:
        return {"interrupted": str(interrupt)}
