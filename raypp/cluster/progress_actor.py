"""An actor that relays progress from workers to the driver. Its process does not import torch."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raypp.cluster import ray_logs
from raypp.cluster.training_metrics import TrainingMetrics
from raypp.cluster.waiting import ResourceNotice, SubmittedParts, current_place
from raypp.utils.progress import ProgressListener, Row

POLL_SECONDS = 0.2
ANSWER_SECONDS = 5
STOP_SECONDS = 25.0  # for checkpoints after a stop request, outside of a job
CLEANUP_SECONDS = 2.0  # that Ray may need to free the resources of a driver
STARTED = "started"  # event of a task or of a group of workers that runs

Event = tuple[str, str, Any]
"""Task, method of its :class:`ProgressListener`, argument."""

ListenerOf = Callable[[str], ProgressListener]
"""Returns the driver's listener of a task."""


class ProgressActor:
    """Holds a queue of events, of steps only the newest of each task, and whether the driver requests a stop."""

    def __init__(self) -> None:
        self._steps: dict[str, Event] = {}
        self._events: list[Event] = []
        self._stop_requested = False

    def request_stop(self) -> None:
        self._stop_requested = True

    def stop_requested(self) -> bool:
        return self._stop_requested

    def report(self, task: str, method: str, value: Any) -> None:
        if method == "step":
            self._steps[task] = task, method, value
        else:
            self._events.append((task, method, value))

    def drain(self) -> list[Event]:
        events = [*self._events, *self._steps.values()]
        self._events, self._steps = [], {}
        return events


class RemoteProgress(ProgressListener):
    """Reports the progress of a task to the driver, and its training to Prometheus.

    Args:
        run: the training's name in Prometheus; the task's by default.
    """

    def __init__(self, actor: Any, task: str = "", run: str | None = None) -> None:
        self._actor, self._task = actor, task
        self.metrics = TrainingMetrics(task if run is None else run)

    def report(self, method: str, value: Any = None) -> None:
        self._actor.report.remote(self._task, method, value)

    def started(self) -> None:
        """Report where the task, or the first worker of its group, runs."""
        self.report(STARTED, current_place())

    def step(self, info: Row) -> None:
        self.report("step", info)
        if "loss" in info:
            self.metrics.update(info)

    def epoch(self, row: Row) -> None:
        self.report("epoch", row)

    def warn(self, message: str) -> None:
        self.report("warn", message)

    def should_stop(self) -> bool:
        return bool(_ask(self._actor.stop_requested, False))


def create_progress_actor() -> Any:
    """Create the actor on the driver's node, so that the loss of a worker node does not end it."""
    # With soft affinity, Ray 2.60 sometimes chose another node although this one had room.
    driver_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0)(ProgressActor).options(scheduling_strategy=driver_node).remote()


def _ask(method: Any, default: Any) -> Any:
    """Call a method of the actor; the default if it does not respond, since a run can do without it."""
    return _result(method.remote(), default)


def _result(reference: Any, default: Any) -> Any:
    try:
        return ray.get(reference, timeout=ANSWER_SECONDS)
    except ray.exceptions.RayError:
        return default


def drain(actor: Any) -> list[Event]:
    """Events since the last call."""
    events: list[Event] = _ask(actor.drain, [])
    return events


class EventPoll:
    """Events of the actor for a loop that must not wait: the actor may still start, or be busy.

    Args:
        seconds: between an answer and the next request.
    """

    def __init__(self, actor: Any, seconds: float) -> None:
        self._actor, self._seconds = actor, seconds
        self._request: Any = None  # of the events since the last answer
        self._next_request = float("-inf")

    def take(self) -> list[Event]:
        """Events that have arrived since the last call."""
        if self._request is None and time.monotonic() >= self._next_request:
            self._request = self._actor.drain.remote()
        return self._answer(0.0)

    def take_last(self, timeout: float) -> list[Event]:
        """All events that were reported before this call; waits at most ``timeout`` seconds twice."""
        events = self._answer(timeout)
        self._request = self._actor.drain.remote()
        return [*events, *self._answer(timeout)]

    def _answer(self, timeout: float) -> list[Event]:
        if self._request is None or not ray.wait([self._request], timeout=timeout)[0]:
            return []
        request, self._request = self._request, None
        self._next_request = time.monotonic() + self._seconds
        events: list[Event] = _result(request, [])
        return events


def relay(actor: Any, listener_of: ListenerOf, parts: SubmittedParts) -> None:
    """Forward the reports of each :class:`RemoteProgress`: starts to ``parts``, others to the driver's listeners."""
    for task, method, value in drain(actor):
        if method == STARTED:
            parts.start(task, value)
        else:
            getattr(listener_of(task), method)(value)


def shutdown_grace_period() -> float:
    """Seconds for checkpoints between a stop request and the end of the driver."""
    if not ray_logs.in_job():
        return STOP_SECONDS
    # Ray kills a job this long after its stop request; 3 seconds is Ray's default.
    return max(0.0, float(os.environ.get("RAY_JOB_STOP_WAIT_TIME_S", "3")) - CLEANUP_SECONDS)


@contextmanager
def polling(actor: Any, listener_of: ListenerOf, parts: SubmittedParts, notice: ResourceNotice) -> Iterator[None]:
    """Relay progress to listeners, and their stop requests to workers, from a thread until the context ends."""
    finished = threading.Event()

    def poll() -> None:
        is_last = False
        while not is_last:
            is_last = finished.wait(POLL_SECONDS)
            if listener_of("").should_stop():
                actor.request_stop.remote()
            relay(actor, listener_of, parts)
            notice.check()

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()
