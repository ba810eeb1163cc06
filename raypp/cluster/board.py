"""What workers tell the driver while they run. A file of its own: the actor's process need not import torch."""

from __future__ import annotations

from typing import Any


class Board:
    """Where workers pin what the driver shows: of each piece of work the newest step, and every event once."""

    def __init__(self) -> None:
        self._steps: dict[str, dict[str, Any]] = {}
        self._events: list[tuple[str, str, Any]] = []

    def pin(self, kind: str, what: Any, work: str = "") -> None:
        if kind == "step":
            self._steps[work] = what
        else:
            self._events.append((work, kind, what))

    def take(self) -> tuple[dict[str, dict[str, Any]], list[tuple[str, str, Any]]]:
        events, self._events = self._events, []
        steps, self._steps = self._steps, {}
        return steps, events
