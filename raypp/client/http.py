"""The client of a served classifier: it protects every image on this machine before anything leaves it.

No method takes a protected image, and none sends another one than its own protection has just made: so there is no way
to send a plain image by mistake. What a client protects with it fetches once, checks against the manifest's hashes and
keeps on disk.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from types import TracebackType
from typing import Any

import httpx

from raypp.bundle.load import PublicBundle
from raypp.client.session import (
    BATCH,
    MAX_ARCHIVE,
    Errors,
    Image,
    Prediction,
    ProtectingSession,
    RemoteError,
    Request,
    Step,
)
from raypp.utils.errors import RayppError
from raypp.utils.images import Pixels


class Client:
    """Classifies images by a service that never sees a plain one.

    Args:
        url: of the service, without a path: ``http://127.0.0.1:8000``.
        token: a bearer token with the scope ``classify``.
        key: key file of a keyed protection.
        pin: the SHA-256 that the protection must have, as ``Client.protection`` gives it: a cloud that serves another
            one is refused, so that it cannot talk its clients into a weaker protection.
        cache: folder where protections are kept; by default below the user's cache folder.
        timeout: seconds for one request; by default more than the service takes to give one up (40).
        patience: seconds for which a request is tried again where trying again is safe.
        on_wait: called with the reason and the seconds left, before a request is tried again that has not been answered
            for a second.

    Raises:
        ConfigError: an argument is not allowed.
        RemoteError: the service does not answer, or refuses.
        BundleError: its protection is damaged, is none at all, or needs a key that was not given.
        DataError: an image cannot be read.
    """

    def __init__(self, url: str, **options: Any) -> None:
        self._session = ProtectingSession(url, **options)
        self._http = httpx.Client(timeout=self._session.timeout, trust_env=self._session.trust_env)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def model(self) -> dict[str, Any]:
        """What the service says of its model: classes, accuracy, scorecard, card."""
        found: dict[str, Any] = self._do(self._session.model())
        return found

    def protection(self) -> tuple[str, PublicBundle]:
        """The protection in use and its SHA-256."""
        found: tuple[str, PublicBundle] = self._do(self._session.protection())
        return found

    def protect(self, images: Sequence[Image]) -> tuple[Pixels, Pixels]:
        """Images as the protection takes them, and the protected ones that would be sent, uint8 (N, H, W, C)."""
        _, plain, hidden = self._do(self._session.protected(images))
        return plain, hidden

    def attacks(self) -> dict[str, Any]:
        """Which attacks are served beside the classifier, their threat levels and measured leakage."""
        found: dict[str, Any] = self._do(self._session.attacks())
        return found

    def reconstruct(self, attack: str, images: Sequence[Image]) -> list[Pixels]:
        """What a served attack makes of images that are protected here: estimates uint8 (H, W, C), in order.

        One request, so no more images than the service's ``max_images`` of that attack.
        """
        found: list[Pixels] = self._do(self._session.reconstruct(attack, images))
        return found

    def classify(self, images: Sequence[Image]) -> list[Prediction]:
        """Protect images here and classify them there; returns a prediction for each, in order."""
        return [prediction for _, prediction in self.stream(images)]

    def stream(
        self, images: Iterable[Image], batch: int = BATCH, on_error: Callable[[Image, RayppError], None] | None = None
    ) -> Iterator[tuple[Image, Prediction]]:
        """As :meth:`classify`, batch by batch: a folder of any size takes the memory of one batch.

        Args:
            batch: images of one request, or as many as the service takes.
            on_error: called with each image that cannot be read, or whose protected form the service takes for a plain
                image, and why; the others go on. By default the error is raised.
        """
        remaining = iter(images)
        # The size of each batch is asked for again: another bundle may have become live.
        while part := list(islice(remaining, self._do(self._session.batch(batch)))):
            errors: Errors | None = None if on_error is None else {}
            yield from self._do(self._session.classify(part, errors))
            _tell(on_error, part, errors)

    def _do(self, steps: Step) -> Any:
        answer: httpx.Response | Exception | None = None
        while True:
            try:
                wanted = steps.send(answer)
            except StopIteration as done:
                return done.value
            answer = None
            if isinstance(wanted, Request):
                try:
                    with self._http.stream(**self._session.request(wanted)) as opened:
                        answer = _whole(opened, _within(opened.iter_bytes()))
                except httpx.HTTPError as error:
                    answer = error
            else:
                time.sleep(wanted)


class AsyncClient:
    """:class:`Client` for asyncio; images are read and protected in a thread."""

    def __init__(self, url: str, **options: Any) -> None:
        self._session = ProtectingSession(url, **options)
        self._http = httpx.AsyncClient(timeout=self._session.timeout, trust_env=self._session.trust_env)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def model(self) -> dict[str, Any]:
        """See :meth:`Client.model`."""
        found: dict[str, Any] = await self._do(self._session.model())
        return found

    async def protection(self) -> tuple[str, PublicBundle]:
        """See :meth:`Client.protection`."""
        found: tuple[str, PublicBundle] = await self._do(self._session.protection())
        return found

    async def protect(self, images: Sequence[Image]) -> tuple[Pixels, Pixels]:
        """See :meth:`Client.protect`."""
        _, plain, hidden = await self._do(self._session.protected(images))
        return plain, hidden

    async def attacks(self) -> dict[str, Any]:
        """See :meth:`Client.attacks`."""
        found: dict[str, Any] = await self._do(self._session.attacks())
        return found

    async def reconstruct(self, attack: str, images: Sequence[Image]) -> list[Pixels]:
        """See :meth:`Client.reconstruct`."""
        found: list[Pixels] = await self._do(self._session.reconstruct(attack, images))
        return found

    async def classify(self, images: Sequence[Image]) -> list[Prediction]:
        """See :meth:`Client.classify`."""
        return [prediction async for _, prediction in self.stream(images)]

    async def stream(
        self, images: Iterable[Image], batch: int = BATCH, on_error: Callable[[Image, RayppError], None] | None = None
    ) -> AsyncIterator[tuple[Image, Prediction]]:
        """See :meth:`Client.stream`."""
        remaining = iter(images)
        while part := list(islice(remaining, await self._do(self._session.batch(batch)))):
            errors: Errors | None = None if on_error is None else {}
            for found in await self._do(self._session.classify(part, errors)):
                yield found
            _tell(on_error, part, errors)

    async def _do(self, steps: Step) -> Any:
        answer: httpx.Response | Exception | None = None
        while True:
            wanted = await asyncio.to_thread(_next, steps, answer)
            if isinstance(wanted, _Done):
                return wanted.value
            answer = None
            if isinstance(wanted, Request):
                try:
                    async with self._http.stream(**self._session.request(wanted)) as opened:
                        chunks = [chunk async for chunk in _within_async(opened.aiter_bytes())]
                        answer = _whole(opened, chunks)
                except httpx.HTTPError as error:
                    answer = error
            else:
                await asyncio.sleep(wanted)


@dataclass(frozen=True)
class _Done:
    value: Any


def _next(steps: Step, answer: httpx.Response | Exception | None) -> Request | float | _Done:
    """One step in a thread, where StopIteration could not be told from the thread's own."""
    try:
        return steps.send(answer)
    except StopIteration as done:
        return _Done(done.value)


def _within(chunks: Iterator[bytes]) -> Iterator[bytes]:
    size = 0
    for chunk in chunks:
        size += len(chunk)
        _refuse_endless(size)
        yield chunk


async def _within_async(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    size = 0
    async for chunk in chunks:
        size += len(chunk)
        _refuse_endless(size)
        yield chunk


def _refuse_endless(size: int) -> None:
    if size > MAX_ARCHIVE:
        raise RemoteError(f"the service's answer is larger than the {MAX_ARCHIVE:,} bytes that a client takes")


def _whole(opened: httpx.Response, chunks: Iterable[bytes]) -> httpx.Response:
    """An answer that was read piece by piece, in one piece and no longer compressed."""
    kept = [(k, v) for k, v in opened.headers.multi_items() if k not in ("content-encoding", "content-length")]
    return httpx.Response(opened.status_code, headers=kept, content=b"".join(chunks), request=opened.request)


def _tell(on_error: Callable[[Image, RayppError], None] | None, images: list[Image], errors: Errors | None) -> None:
    for place, error in sorted((errors or {}).items()):
        assert on_error is not None
        on_error(images[place], error)
