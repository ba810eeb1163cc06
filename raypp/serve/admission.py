"""Limits of a service, and refusals."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from raypp.utils.errors import RayppError


class RequestError(RayppError):
    """A request that is answered by an error of the client's making.

    Args:
        status: HTTP status.
        code: a stable name of the problem, for programs.
        more: what else the problem document says, for programs too.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        headers: dict[str, str] | None = None,
        more: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.headers, self.more = status, code, headers or {}, more or {}


@dataclass(frozen=True)
class Limits:
    """What one request may hold at most, and all together that wait for the classifier."""

    body: int = 16 * 2**20
    """Bytes."""
    images: int = 256
    seconds: float = 30.0
    """Until a request is given up."""
    idle: float = 5.0
    """Seconds between two parts of a body."""
    waiting: int = 4096
    """Images that wait in a replica: it counts requests by itself, and 128 full ones would wait longer than that."""


class AdmissionControl:
    """How many images wait for the classifier, itself included; for one event loop."""

    def __init__(self, most: int) -> None:
        self.most, self.now = most, 0

    @contextmanager
    def admitted(self, num: int) -> Iterator[None]:
        """Count ``num`` images while they wait, or raise RefusedError (503); a first request always may."""
        if self.now and self.now + num > self.most:
            raise RequestError(
                503,
                "busy",
                f"{self.now} images wait already, with these {num} more than {self.most}; come back after Retry-After",
                {"Retry-After": "1"},
            )
        self.now += num
        try:
            yield
        finally:
            self.now -= num
