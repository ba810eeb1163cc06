"""The thread of a replica in which models run."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any


class InferenceThread:
    """Runs functions one after the other in one thread, and measures how busy it is; the event loop stays free."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, "raypp-compute")
        self._start: float | None = None
        self._busy_seconds = 0.0
        self._last_call = time.monotonic(), 0.0

    async def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function in the thread."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, self._call, function, *arguments)

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        self._start = start = time.monotonic()
        try:
            return function(*arguments)
        finally:
            self._start = None
            self._busy_seconds += time.monotonic() - start

    def seconds_running(self) -> float:
        """Duration of the current computation, in seconds; 0.0 without one."""
        start = self._start  # one read: the thread may end the computation meanwhile
        return 0.0 if start is None else time.monotonic() - start

    def busy_share(self) -> float:
        """Share of the time since the previous call in which the thread computed, in [0, 1]."""
        now, busy = time.monotonic(), self._busy_seconds + self.seconds_running()
        (before, busy_before), self._last_call = self._last_call, (now, busy)
        return min(max((busy - busy_before) / max(now - before, 1e-9), 0.0), 1.0)
