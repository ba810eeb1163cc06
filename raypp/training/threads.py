"""How many threads torch computes with while other processes use the same processor cores.

Torch's threads wait for each other after every operation. If another process holds the core of one of them, all wait:
two threads beside two busy ones compute several times less than one thread does. So a loop on the CPU gives up the
cores that others use, and takes them back when they are free.
"""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from types import TracebackType

import torch

from raypp.utils import runtime

STAT = Path("/proc/stat")
SECONDS = 1.0  # between two looks at the machine
SPARE = 0.3  # cores that other processes may use before a thread is given up: housekeeping is less than that
BUSY = (0, 1, 2, 5, 6)  # columns of /proc/stat: user, nice, system, irq, softirq


class AdaptiveThreads:
    """Set torch's number of threads by what other processes leave free; the number found is restored at exit.

    Rounding depends on the number of threads, so results differ in their last bits from one run to the next.

    Args:
        enabled: False keeps the number of threads. So does a machine without ``/proc/stat``, and one thread.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.most = torch.get_num_threads()
        self.enabled = enabled and self.most > 1 and STAT.exists()

    def __enter__(self) -> AdaptiveThreads:
        self.last = _sample() if self.enabled else (0.0, 0.0, 0.0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.enabled:
            torch.set_num_threads(self.most)

    def update(self) -> None:
        """Adapt the number of threads, at most once a second; call it once per step."""
        if not self.enabled or time.monotonic() - self.last[0] < SECONDS:
            return
        now = _sample()
        seconds, busy, own = (after - before for after, before in zip(now, self.last, strict=True))
        self.last = now
        threads = num_threads(self.most, runtime.num_cores(), (busy - own) / seconds)
        if threads != torch.get_num_threads():
            torch.set_num_threads(threads)


def num_threads(most: int, cores: int, others: float) -> int:
    """Return how many threads to compute with, 1 to ``most``.

    Args:
        most: threads on an idle machine.
        cores: cores that this process may use.
        others: cores that other processes keep busy, 0 to ``cores``.
    """
    return max(1, min(most, cores - max(0, math.ceil(others - SPARE))))


def _sample() -> tuple[float, float, float]:
    """Clock, busy time of the cores that this process may use, and processor time of this process, in seconds."""
    allowed = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    ticks = 0
    for line in STAT.read_text().splitlines():
        name, *columns = line.split()
        if name in allowed:
            ticks += sum(int(columns[i]) for i in BUSY)
    return time.monotonic(), ticks / os.sysconf("SC_CLK_TCK"), time.process_time()
