"""Independent tasks in parallel on a cluster, such as the runs of Table I or the attacks of a suite."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

import ray
import torch

from raypp.cluster import progress_actor
from raypp.cluster.progress_actor import create_progress_actor, stop_requested
from raypp.cluster.session import ray_session, resource_warnings, uses_gpu
from raypp.config.schema import Cluster
from raypp.utils.errors import RayppError, TrainingInterrupted, first_line
from raypp.utils.progress import MultiProgressDisplay, Row
from raypp.utils.signals import stop_on_signal

POLL_SECONDS = 0.5

Work = Mapping[str, tuple[Any, ...]]
"""Arguments by task."""

Outcome = dict[str, Any]
"""``{"result": ...}``, ``{"error": sentence}`` or ``{"interrupted": sentence}``."""


class RemoteProgress:
    """Reports the progress of one task to the driver."""

    def __init__(self, actor: Any, task: str) -> None:
        self._actor, self._task = actor, task

    def step(self, info: Row) -> None:
        self._actor.report.remote("step", info, self._task)

    def epoch(self, row: Row) -> None:
        """Ignored: the display of many tasks shows no epochs."""

    def warn(self, message: str) -> None:
        self._actor.report.remote("warning", message, self._task)

    def should_stop(self) -> bool:
        return stop_requested(self._actor)


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
        remote_call = ray.remote(
            **task_resources(cluster, resources, what, display),
            max_retries=cluster.max_failures,
            max_calls=1,  # a new process per task, without the memory and settings of the last one
        )(_call)
        actor = create_progress_actor()

        def submit(name: str, arguments: tuple[Any, ...]) -> Any:
            return remote_call.remote(function, arguments, name, actor, cluster.cpus_per_worker)

        if not _run_until_done(submit, work, after or {}, actor, display, on_done):
            display.raise_if_stop_requested()


def _run_until_done(
    submit: Callable[[str, tuple[Any, ...]], Any],
    work: Work,
    after: Mapping[str, Collection[str]],
    actor: Any,
    display: MultiProgressDisplay,
    on_done: Callable[[str, Outcome], None],
) -> bool:
    """Run tasks until all have ended or a stop was requested; returns whether all have ended."""
    pending = dict(work)
    running: dict[Any, str] = {}
    deadline: float | None = None  # of running tasks, after a stop request
    all_done = True
    while pending or running:
        if deadline is None and display.stop.is_set():
            actor.request_stop.remote()
            deadline = time.monotonic() + progress_actor.shutdown_grace_period()
            all_done = not pending
            pending.clear()
        if deadline is not None and time.monotonic() > deadline:
            return False
        unfinished = {*pending, *running.values()}
        for name in [name for name in pending if not unfinished.intersection(after.get(name, ()))]:
            running[submit(name, pending.pop(name))] = name
        ready, _ = ray.wait(list(running), num_returns=1, timeout=POLL_SECONDS)
        show_progress(display, *progress_actor.drain(actor))
        for reference in ready:
            name, outcome = running.pop(reference), _outcome(reference)
            if "interrupted" in outcome:
                all_done = False
            else:
                on_done(name, outcome)
    return all_done


def show_progress(display: MultiProgressDisplay, steps: progress_actor.Steps, events: progress_actor.Events) -> None:
    """Show what tasks have reported by :class:`RemoteProgress`."""
    for name, step in steps.items():
        display.step(name, step)
    for name, _, message in events:
        display.warn(name, message)


def _outcome(reference: Any) -> Outcome:
    try:
        outcome: Outcome = ray.get(reference)
    except ray.exceptions.RayTaskError as error:  # not a RayppError
        cause = error.cause or error
        return {"error": f"it failed: {type(cause).__name__}: {' '.join(str(cause).split())}"}
    except ray.exceptions.RayError as error:
        return {"error": f"its worker died too often: {first_line(error)}"}
    return outcome


def task_resources(
    cluster: Cluster, resources: dict[str, float], what: str, display: MultiProgressDisplay, num: int = 1
) -> dict[str, float]:
    """Ray's resource options of one of ``num`` parallel workers; warns if a growing cluster lacks them yet.

    Raises:
        ConfigError: the cluster cannot grow.
    """
    use_gpu = uses_gpu(cluster, resources)
    required = {"CPU": num * cluster.cpus_per_worker, "GPU": float(num * use_gpu)}
    for warning in resource_warnings(f"{what} needs", required, resources):
        display.warn("cluster", warning)
    return {"num_cpus": cluster.cpus_per_worker, "num_gpus": int(use_gpu)}


def _call(function: Callable[..., Any], arguments: tuple[Any, ...], name: str, actor: Any, cpus: float) -> Outcome:
    torch.set_num_threads(max(1, int(cpus)))
    if stop_requested(actor):  # while the task waited for resources
        return {"interrupted": "not started"}
    try:
        return {"result": function(*arguments, RemoteProgress(actor, name))}
    except RayppError as error:
        return {"error": str(error)}
    except TrainingInterrupted as interrupt:
        return {"interrupted": str(interrupt)}
