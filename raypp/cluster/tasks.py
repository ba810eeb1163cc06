"""Independent tasks in parallel on a cluster: the cells of Table I, and by :mod:`raypp.cluster.attack` attacks."""

from __future__ import annotations

import signal
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from raypp.utils.errors import ConfigError, RayppError, TrainingInterrupted, first_line
from raypp.utils.progress import MultiProgressDisplay, ProgressListener
from raypp.utils.signals import stop_on_signal
from raypp.utils.storage import Storage

POLL_SECONDS = 0.5

Work = Mapping[str, tuple[Any, ...]]
"""Arguments by task."""

Outcome = dict[str, Any]
"""``{"result": ...}``, ``{"error": sentence, "exit_code": ...}`` or ``{"interrupted": sentence}``."""

NODE = "node"
"""Key of an outcome that names the node of a task which does not see the driver's storage."""


def run_tasks(
    function: Callable[..., Any],
    work: Work,
    cluster: Cluster,
    storage: Storage,
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
        storage: the folder below which tasks write; every node has to see it.
        on_done: called with each task and its ``{"result": ...}`` or ``{"error": sentence}``.
        what: a task's name in messages, such as "an attack".
        after: tasks that have to end before another one starts.

    Raises:
        ConfigError: no task fits into a cluster that cannot grow, or a node does not see ``storage``.
        TrainingInterrupted: by ``display`` or SIGTERM, after checkpoints or the grace period.
    """
    # ray_session comes first: Ray's start replaces the handler of the signal.
    with ray_session() as resources, stop_on_signal(display.stop, signal.SIGTERM), _marked(storage) as marker:
        num_cpus, num_gpus = cluster.cpus_per_worker, int(uses_gpu(cluster, resources))
        check_resources(f"{what} needs", num_cpus, num_gpus, resources, display.of("cluster"))
        remote_call = ray.remote(
            num_cpus=num_cpus,
            num_gpus=num_gpus,
            max_retries=cluster.max_failures,
            max_calls=1,  # a new process per task, without the memory and settings of the last one
        )(_call)
        actor = create_progress_actor()
        submit = partial(remote_call.remote, function, num_cpus, actor, marker)
        required, parts = {"CPU": num_cpus, "GPU": num_gpus}, SubmittedParts()
        notice = ResourceNotice(what, required, cluster.notice_seconds, parts.all_wait, display.of("cluster").warn)

        def check(name: str, outcome: Outcome) -> None:
            if NODE in outcome:
                raise ConfigError(
                    f"node {outcome[NODE]} does not see the driver's files in {storage.uri}; set --storage to a folder "
                    "that all nodes share, or to a URI such as s3://bucket/runs"
                )
            on_done(name, outcome)

        if not _run_until_done(submit, work, after or {}, actor, display, check, parts, notice):
            display.raise_if_stop_requested()


@contextmanager
def _marked(storage: Storage) -> Iterator[tuple[str, str]]:
    """Write a file by which a task recognizes the driver's storage; yields its folder and name."""
    name = f".driver-{uuid.uuid4().hex}"
    storage.create()
    storage.write(name, b"")
    try:
        yield storage.uri, name
    finally:
        storage.remove(name)


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

    def on_cell_done(name: str, outcome: Outcome) -> None:
        on_done(cells[name], outcome)

    run_tasks(_train_cell, work, cluster, Storage(cluster.storage), display, on_cell_done, what="a cell")


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


def _call(
    function: Callable[..., Any],
    cpus: float,
    actor: Any,
    marker: tuple[str, str],
    name: str,
    arguments: tuple[Any, ...],
) -> Outcome:
    folder, file = marker
    if not Storage(folder).exists(file):
        return {NODE: ray.util.get_node_ip_address()}
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
