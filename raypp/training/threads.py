"""Adapts torch's number of threads to the cores that other processes leave free.

Torch's threads wait for each other after every operation, so all wait while another process occupies one core. On two
busy cores two threads are several times slower than one.
"""

from __future__ import annotations

import math
import os
import time
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from raypp.utils import runtime

STAT = Path("/proc/stat")
SECONDS = 1.0  # between two measurements
SPARE = 0.3  # cores that background processes may use before the number of threads falls
BUSY = (0, 1, 2, 5, 6)  # columns of /proc/stat: user, nice, system, irq, softirq


class AdaptiveThreads(AbstractContextManager["AdaptiveThreads"]):
    """Adapts torch's number of threads to other processes, and restores it at exit.

    Rounding depends on the number of threads, so results differ in their last bits between runs.

    Args:
        enabled: False keeps the number of threads; so do one thread and a machine without ``/proc/stat``.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.max_threads = torch.get_num_threads()
        self.enabled = enabled and self.max_threads > 1 and STAT.exists()
        self.last = _sample() if self.enabled else (0.0, 0.0, 0.0)

    def __exit__(self, *_: object) -> None:
        if self.enabled:
            torch.set_num_threads(self.max_threads)

    def update(self) -> None:
        """Adapt the number of threads, at most once a second; call it once per step."""
        if not self.enabled or time.monotonic() - self.last[0] < SECONDS:
            return
        sample = _sample()
        seconds, busy, own = (after - before for after, before in zip(sample, self.last, strict=True))
        self.last = sample
        threads = num_threads(self.max_threads, runtime.num_cores(), (busy - own) / seconds)
        if threads != torch.get_num_threads():
            torch.set_num_threads(threads)


def num_threads(max_threads: int, cores: int, others: float) -> int:
    """Return the number of threads to use, 1 to ``max_threads``.

    Args:
        max_threads: threads on an idle machine.
        cores: cores that this process may use.
        others: cores that other processes keep busy, 0 to ``cores``.
    """
    return max(1, min(max_threads, cores - max(0, math.ceil(others - SPARE))))


def _sample() -> tuple[float, float, float]:
    """Clock, busy time of the cores this process may use, and processor time of this process, all in seconds."""
    allowed = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    ticks = 0
    for line in STAT.read_text().splitlines():
        name, *columns = line.split()
        if name in allowed:
            ticks += sum(int(columns[i]) for i in BUSY)
    return time.monotonic(), ticks / os.sysconf("SC_CLK_TCK"), time.process_time()
