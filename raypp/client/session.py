"""HTTP requests to one service: its address, the token, retries and errors."""

from __future__ import annotations

import io
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np

import raypp
from raypp.utils.errors import ConfigError, DataError, RayppError
from raypp.utils.images import Pixels
from raypp.utils.network import is_loopback

MAX_RESPONSE = 2**30  # bytes
CONNECT_TIMEOUT = 5.0  # seconds; detects a missing host earlier than the timeout of a whole request
SILENT_SECONDS = 1.0  # of retries before the first call of `on_wait`
STARTUP_SECONDS = 5.0  # of retries after a 404 of Ray Serve's proxy, if the service has not responded before
MAX_DOUBLINGS = 10  # of the retry delay; avoids an overflow
MAX_BACKOFF = 5.0  # seconds of exponential backoff
MAX_RETRY_AFTER = 30.0  # seconds that a service can demand between two tries
RETRIED = frozenset({408, 429, 500, 502, 503, 504})
"""Status codes after which a request is sent again: no request changes anything on the server."""


class RemoteError(RayppError):
    """The service refuses a request, or cannot be reached.

    Attributes:
        status: HTTP status, or None without a response.
        code: stable name of the problem, such as ``not-protected``, or None.
    """

    def __init__(self, message: str, status: int | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code

    @classmethod
    def from_response(cls, response: httpx.Response) -> RemoteError:
        """The problem that a response describes."""
        try:
            document = response.json()
            detail, code = str(document["detail"]), str(document.get("type", "")).rpartition(":")[2] or None
        except (ValueError, KeyError, TypeError, AttributeError):
            text = response.text.strip()
            detail, code = text.splitlines()[0][:200] if text else "no reason given", None
        message = f"{response.request.url.host} answers {response.status_code}: {detail}"
        return cls(message, response.status_code, code)


@dataclass(frozen=True)
class Prediction:
    """The predicted class of one image, the most likely classes with their probabilities, and the model's version."""

    label: str
    probability: float
    top: tuple[tuple[str, float], ...]
    model: str


class Session:
    """A connection pool for one service. Arguments and errors: see :class:`raypp.Client`."""

    def __init__(
        self, url: str, token: str | None, timeout: float, patience: float, on_wait: Callable[[str, float], None] | None
    ) -> None:
        host = _validate_url(url, token)
        if not (timeout > 0 and patience >= 0):
            raise ConfigError(f"timeout is {timeout} and patience {patience}; allowed are times above zero")
        self.url = url.rstrip("/").removesuffix("/classifier")
        self._patience, self._on_wait = patience, on_wait
        self._has_responded = False
        self._closed = threading.Event()
        headers = {"User-Agent": f"raypp/{raypp.__version__}"}
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        self.http = httpx.Client(
            headers=headers,
            timeout=httpx.Timeout(timeout, connect=min(timeout, CONNECT_TIMEOUT)),
            trust_env=not is_loopback(host),  # requests to this machine must not pass a proxy
        )

    def close(self) -> None:
        """Close all connections. A retry that is due in another thread fails."""
        self._closed.set()
        self.http.close()

    def get(self, path: str, headers: dict[str, str] | None = None) -> httpx.Response:
        """GET with retries; raises RemoteError for any status but 200 and 304."""
        response = self.send("GET", path, headers)
        if response.status_code not in (200, 304):
            raise RemoteError.from_response(response)
        return response

    def get_json(self, path: str) -> dict[str, Any]:
        response = self.get(path)
        with parsing(response):
            document: dict[str, Any] = response.json()
            return document

    def post_images(self, path: str, images: Pixels, protection: str) -> httpx.Response:
        """POST protected images uint8 (N, H, W, C) with the SHA-256 of their protection."""
        buffer = io.BytesIO()
        np.save(buffer, images, allow_pickle=False)
        headers = {"Content-Type": "application/x-npy", "Raypp-Protection": protection}
        return self.send("POST", path, headers, buffer.getvalue())

    def send(
        self, method: str, path: str, headers: dict[str, str] | None = None, body: bytes | None = None
    ) -> httpx.Response:
        """Send a request until the response is final; raises RemoteError if there is none within ``patience``."""
        start, attempt = time.monotonic(), 0
        deadline = start + self._patience
        while True:
            response: httpx.Response | None = None
            try:
                with self.http.stream(method, self.url + path, headers=headers, content=body) as stream:
                    response = _read_response(stream)
            except httpx.HTTPError as error:
                problem = RemoteError(f"{self.url} does not answer: {str(error).strip() or type(error).__name__}")
                problem.__cause__ = error
            else:
                if not self._is_retryable(response, path, start):
                    self._has_responded |= response.status_code < 400
                    return response
                problem = RemoteError.from_response(response)
            delay, now = retry_delay(response, attempt), time.monotonic()
            if now + delay > deadline:
                raise problem
            if self._on_wait is not None and now - start > SILENT_SECONDS:
                self._on_wait(str(problem), deadline - now)
            if self._closed.wait(delay):
                raise RemoteError("the client was closed while it waited for another attempt") from problem
            attempt += 1

    def _is_retryable(self, response: httpx.Response, path: str, start: float) -> bool:
        # Ray Serve's proxy responds with such a 404 while a service starts or restarts.
        is_starting = response.status_code == 404 and "/-/routes" in response.text and path.startswith("/classifier/")
        may_start = self._has_responded or time.monotonic() < start + STARTUP_SECONDS
        return response.status_code in RETRIED or (is_starting and may_start)


def _validate_url(url: str, token: str | None) -> str:
    """Return the host of a URL to which the token may be sent."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        parsed = httpx.URL()
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ConfigError(f"url is {url!r}; allowed is http:// or https:// with a host")
    if token is not None and not (token.isascii() and token.isprintable()):
        raise ConfigError("token holds characters that no token has; is it the right file?")
    if token is not None and parsed.scheme == "http" and not is_loopback(parsed.host):
        raise ConfigError(f"url is {url!r}: a token is sent over https only, or to this machine")
    return parsed.host


def _read_response(response: httpx.Response) -> httpx.Response:
    """Read and decompress a streamed response up to ``MAX_RESPONSE`` bytes."""
    body = bytearray()
    for chunk in response.iter_bytes():
        body += chunk
        if len(body) > MAX_RESPONSE:
            raise RemoteError(f"the service's answer is larger than the {MAX_RESPONSE:,} bytes that a client takes")
    headers = [(k, v) for k, v in response.headers.multi_items() if k not in ("content-encoding", "content-length")]
    return httpx.Response(response.status_code, headers=headers, content=bytes(body), request=response.request)


def retry_delay(response: httpx.Response | None, attempt: int) -> float:
    """Seconds until the next try: ``Retry-After`` plus exponential backoff with jitter."""
    header = response.headers.get("retry-after", "") if response is not None else ""
    demanded = min(float(header), MAX_RETRY_AFTER) if header.isascii() and header.isdigit() else 0.0
    backoff = min(0.1 * 2 ** min(attempt, MAX_DOUBLINGS), MAX_BACKOFF)
    return float(demanded + random.uniform(0.5, 1.0) * backoff)


@contextmanager
def parsing(response: httpx.Response) -> Iterator[None]:
    """Turn errors of code that parses a response into RemoteError."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, DataError) as error:
        raise RemoteError(
            f"{response.request.url} answers with something else than a raypp service does", response.status_code
        ) from error


def parse_predictions(response: httpx.Response) -> list[Prediction]:
    document = response.json()
    return [
        Prediction(
            label=str(item["class"]),
            probability=float(item["probability"]),
            top=tuple((str(entry["class"]), float(entry["probability"])) for entry in item["top"]),
            model=document["model"],
        )
        for item in document["images"]
    ]


def parse_refused(response: httpx.Response, indices: list[int]) -> list[int]:
    """Indices of the images that the service refuses as not protected."""
    with parsing(response):
        positions = response.json().get("images") or []
        if not all(type(position) is int and 0 <= position < len(indices) for position in positions):
            raise ValueError("positions of images that were not sent")
        return [indices[position] for position in positions]
