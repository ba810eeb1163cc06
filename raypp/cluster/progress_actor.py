"""What workers tell the driver while they run. A file of its own: the actor's process need not import torch."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

POLL_SECONDS = 0.2
STOP_SECONDS = 25.0  # for checkpoints, where nobody says how long there is
GIVE_BACK_SECONDS = 2.0  # what Ray may need to take back what a driver holds

Steps = dict[str, dict[str, Any]]
Events = list[tuple[str, str, Any]]


class ProgressActor:
    """Where workers pin what the driver shows: of each piece of work the newest step, and every event once."""

    def __init__(self) -> None:
        self._steps: Steps = {}
        self._events: Events = []
        self._stop = False

    def stop(self) -> None:
        """Tell whoever asks to write a checkpoint and end."""
        self._stop = True

    def stopping(self) -> bool:
        return self._stop

    def pin(self, kind: str, what: Any, work: str = "") -> None:
        if kind == "step":
            self._steps[work] = what
        else:
            self._events.append((work, kind, what))

    def take(self) -> tuple[Steps, Events]:
        events, self._events = self._events, []
        steps, self._steps = self._steps, {}
        return steps, events


def create_progress_actor() -> Any:
    """Start a board on the driver's own node: anywhere else, a node that leaves would take it along."""
    # With soft affinity, Ray 2.60 sometimes chose another node although this one had room.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0)(ProgressActor).options(scheduling_strategy=here).remote()


def drain(board: Any) -> tuple[Steps, Events]:
    """What is new on a board; nothing where it does not answer: the display is not worth a run."""
    try:
        found: tuple[Steps, Events] = ray.get(board.take.remote(), timeout=5)
    except ray.exceptions.RayError:
        return {}, []
    return found


def stop_requested(board: Any) -> bool:
    """Whether the driver has been told to stop; no, where the board does not answer."""
    try:
        return bool(ray.get(board.stopping.remote(), timeout=5))
    except ray.exceptions.RayError:
        return False


def shutdown_grace_period() -> float:
    """How long checkpoints may take before the driver has to end."""
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:
        return STOP_SECONDS
    # A job is killed so long after it was told to stop; 3 seconds is Ray's own default.
    return max(0.0, float(os.environ.get("RAY_JOB_STOP_WAIT_TIME_S", "3")) - GIVE_BACK_SECONDS)


@contextmanager
def polling(board: Any, show: Callable[[Steps, Events], None]) -> Iterator[None]:
    """Call ``show`` with what is new on the board, from a thread, while the driver waits for something else."""
    finished = threading.Event()

    def follow() -> None:
        while not finished.wait(POLL_SECONDS):
            show(*drain(board))

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()
        show(*drain(board))
