"""Limits of a service, and refusals."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from raypp.utils.errors import RayppError


class RequestError(RayppError):
    """The service refuses a request.

    Args:
        status: HTTP status, from 400.
        code: stable name of the problem, for programs.
        headers: headers of the response.
        members: further members of the problem document.
    """

    def __init__(
        self, status: int, code: str, message: str, headers: dict[str, str] | None = None, **members: Any
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.headers, self.members = status, code, headers or {}, members


@dataclass(frozen=True)
class Limits:
    """Limits of one request and of the queue of a replica."""

    body: int = 16 * 2**20
    """Bytes."""
    images: int = 256
    seconds: float = 30.0
    """Timeout of a request."""
    idle: float = 5.0
    """Timeout between two parts of a body, in seconds."""
    waiting: int = 4096
    """Images that wait in a replica. Serve counts requests, but 128 full ones would wait longer than ``seconds``."""


class AdmissionControl:
    """Limits how many images wait for the classifier or are computed; for one event loop."""

    def __init__(self, max_images: int) -> None:
        self.max_images, self.num_images = max_images, 0

    @contextmanager
    def acquire(self, num: int) -> Iterator[None]:
        """Count ``num`` images while they wait; raises RequestError (503) if others wait and the sum is too high."""
        if self.num_images and self.num_images + num > self.max_images:
            reason = f"{self.num_images} images wait already, and {num} more exceed the limit of {self.max_images}"
            raise RequestError(503, "busy", f"{reason}; send the request again after Retry-After", {"Retry-After": "1"})
        self.num_images += num
        try:
            yield
        finally:
            self.num_images -= num
