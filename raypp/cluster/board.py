"""What a worker tells the driver while it runs. A file of its own: the actor's process need not import torch."""

from __future__ import annotations

from typing import Any


class Board:
    """Where rank 0 pins what the driver shows: the newest step, and every epoch and warning once."""

    def __init__(self) -> None:
        self._step: dict[str, Any] | None = None
        self._events: list[tuple[str, Any]] = []

    def pin(self, kind: str, what: Any) -> None:
        if kind == "step":
            self._step = what
        else:
            self._events.append((kind, what))

    def take(self) -> tuple[dict[str, Any] | None, list[tuple[str, Any]]]:
        events, self._events = self._events, []
        return self._step, events
