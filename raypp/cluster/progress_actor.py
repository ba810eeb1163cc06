"""An actor that relays progress from workers to the driver. Its process does not import torch."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

POLL_SECONDS = 0.2
ANSWER_SECONDS = 5
STOP_SECONDS = 25.0  # for checkpoints after a stop request, outside of a job
CLEANUP_SECONDS = 2.0  # that Ray may need to free the resources of a driver

Steps = dict[str, dict[str, Any]]
"""The newest step of each task."""

Events = list[tuple[str, str, Any]]
"""Task, kind of event, value."""


class ProgressActor:
    """Holds the newest step of each task, a queue of events, and whether the driver requests a stop."""

    def __init__(self) -> None:
        self._steps: Steps = {}
        self._events: Events = []
        self._stop_requested = False

    def request_stop(self) -> None:
        self._stop_requested = True

    def stop_requested(self) -> bool:
        return self._stop_requested

    def report(self, kind: str, value: Any, task: str = "") -> None:
        if kind == "step":
            self._steps[task] = value
        else:
            self._events.append((task, kind, value))

    def drain(self) -> tuple[Steps, Events]:
        events, self._events = self._events, []
        steps, self._steps = self._steps, {}
        return steps, events


def create_progress_actor() -> Any:
    """Create the actor on the driver's node, so that the loss of a worker node does not end it."""
    # With soft affinity, Ray 2.60 sometimes chose another node although this one had room.
    driver_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0)(ProgressActor).options(scheduling_strategy=driver_node).remote()


def drain(actor: Any) -> tuple[Steps, Events]:
    """Steps and events since the last call; none if the actor does not respond, since a run can do without them."""
    try:
        steps, events = ray.get(actor.drain.remote(), timeout=ANSWER_SECONDS)
    except ray.exceptions.RayError:
        return {}, []
    return steps, events


def stop_requested(actor: Any) -> bool:
    """Whether the driver requests a stop; False if the actor does not respond."""
    try:
        return bool(ray.get(actor.stop_requested.remote(), timeout=ANSWER_SECONDS))
    except ray.exceptions.RayError:
        return False


def shutdown_grace_period() -> float:
    """Seconds for checkpoints between a stop request and the end of the driver."""
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:
        return STOP_SECONDS
    # Ray kills a job this long after its stop request; 3 seconds is Ray's default.
    return max(0.0, float(os.environ.get("RAY_JOB_STOP_WAIT_TIME_S", "3")) - CLEANUP_SECONDS)


@contextmanager
def polling(actor: Any, show: Callable[[Steps, Events], None]) -> Iterator[None]:
    """Call ``show`` with new steps and events, from a thread, until the context ends."""
    finished = threading.Event()

    def poll() -> None:
        while not finished.wait(POLL_SECONDS):
            show(*drain(actor))

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()
        show(*drain(actor))
