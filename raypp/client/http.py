"""Clients of a served classifier. They protect every image on this machine before they send it.

No method accepts a protected image: each sends only what its own protection has just produced. A client fetches this
protection once, checks it against the hashes of its manifest and caches it on disk.
"""

from __future__ import annotations

import asyncio
import base64
import functools
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar
from urllib.parse import quote

import httpx
import numpy as np

from raypp.bundle.load import PublicBundle
from raypp.client.offline import protect_images
from raypp.client.protection import SHA256, Image, ProtectionCache, find_unprotected, load_image
from raypp.client.session import Prediction, RemoteError, Session, parse_predictions, parse_refused, parsing
from raypp.utils.errors import ConfigError, DataError, RayppError
from raypp.utils.images import Pixels, decode

BATCH = 64  # images of a request: fills the batches of a classifier
NPY_HEADER = 1024  # bytes; an upper bound
MAX_REFRESHES = 2  # of the protection within one request, after the service has switched to another bundle
MAX_THREADS = 64  # of an asynchronous client: requests that are under way at once

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Errors = dict[int, RayppError]
"""Errors of single images by their index in the batch."""
ErrorHandler = Callable[[Image, RayppError], None]


@dataclass(frozen=True)
class _Batch:
    """Images of a request: their indices, and both forms as uint8 (N, H, W, C)."""

    protection: str
    indices: list[int]
    plain: Pixels
    protected: Pixels


class Client:
    """Classifies images by a service that never receives a plain one.

    Args:
        url: of the service, without a path: ``http://127.0.0.1:8000``.
        token: a bearer token with the scope ``classify``.
        key: key file of a keyed protection.
        pin: required SHA-256 of the protection, as :meth:`protection` returns it. The client refuses any other one, so
            that a service cannot replace it by a weaker protection.
        cache: folder for fetched protections; by default below the user's cache folder.
        timeout: seconds for one request; the default exceeds the 40 s after which the service's proxy gives up.
        patience: seconds for which a failed request is retried.
        on_wait: called before a retry with the reason and the seconds left, after the first second of retries.

    Raises:
        ConfigError: an argument is not allowed.
        RemoteError: the service does not respond, or refuses.
        BundleError: its protection is damaged, changes nothing, or needs a key.
        DataError: an image cannot be read.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        key: str | Path | None = None,
        pin: str | None = None,
        cache: str | Path | None = None,
        timeout: float = 45.0,
        patience: float = 60.0,
        on_wait: Callable[[str, float], None] | None = None,
    ) -> None:
        if pin is not None and not SHA256.fullmatch(pin.lower()):
            raise ConfigError(f"pin is {pin!r}; allowed is a SHA-256, 64 hexadecimal digits")
        self._cache = ProtectionCache(cache, key)
        self._pin = pin.lower() if pin is not None else None
        self._session = Session(url, token, timeout, patience, on_wait)
        self._protection: tuple[str, PublicBundle] | None = None
        self._max_images: tuple[str, int] | None = None  # the protection, and how many of its images fit a request

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._session.close()

    def model(self) -> dict[str, Any]:
        """The service's description of its model: classes, accuracy, scorecard, card."""
        return self._session.get_json("/classifier/v1/model")

    def protection(self) -> tuple[str, PublicBundle]:
        """The SHA-256 of the protection in use, and the protection; the first call fetches it."""
        return self._protection or self._fetch_protection()

    def protect(self, images: Sequence[Image]) -> tuple[Pixels, Pixels]:
        """Images, fitted to the protection's size, and their protected forms, both uint8 (N, H, W, C)."""
        batch = self._protect(dict(enumerate(images)))
        return batch.plain, batch.protected

    def attacks(self) -> dict[str, Any]:
        """The attacks that the service offers, their threat levels and measured leakage."""
        return self._session.get_json("/attack/v1")

    def reconstruct(self, attack: str, images: Sequence[Image]) -> list[Pixels]:
        """Protect images and attack them by the service; returns estimates uint8 (H, W, C), in order.

        One request, so no more images than the service's ``max_images`` of that attack.
        """
        batch, response = self._send_protected(f"/attack/v1/{quote(attack, safe='')}", dict(enumerate(images)))
        if response.status_code != 200:
            raise RemoteError.from_response(response)
        with parsing(response):
            return [
                decode(base64.b64decode(item["png"]), name=f"reconstruction {number}", channels=batch.plain.shape[3])
                for number, item in enumerate(response.json()["reconstructions"], 1)
            ]

    def classify(self, images: Sequence[Image]) -> list[Prediction]:
        """Protect images and classify them by the service; returns a prediction for each, in order."""
        return [prediction for _, prediction in self.stream(images)]

    def stream(
        self, images: Iterable[Image], batch: int = BATCH, on_error: ErrorHandler | None = None
    ) -> Iterator[tuple[Image, Prediction]]:
        """Classify batch by batch, in the memory of one batch; yields each image with its prediction.

        Args:
            batch: images of one request; the service may take fewer.
            on_error: called with the image and the error, where an image cannot be read or the service takes its
                protected form for a plain image. By default the error is raised.
        """
        remaining = iter(images)
        while part := list(islice(remaining, self._batch_size(batch))):
            errors: Errors | None = None if on_error is None else {}
            for index, prediction in self._classify(dict(enumerate(part)), errors):
                yield part[index], prediction
            _report_errors(on_error, part, errors)

    def _fetch_protection(self) -> tuple[str, PublicBundle]:
        # The request names no cached protection of another service: it would tell this one about the client.
        current = self._protection  # another thread may set it to None
        cached = self._pin or (current[0] if current is not None else None)
        headers = {"If-None-Match": f'"{cached}"'} if cached is not None and cached in self._cache else {}
        response = self._session.get("/classifier/v1/protection", headers)
        identifier = response.headers.get("etag", "").strip().removeprefix("W/").strip('"')  # proxies weaken it
        url = self._session.url
        if self._pin is not None and identifier != self._pin:
            raise RemoteError(f"{url} serves the protection {identifier}; this client is pinned to {self._pin}")
        self._protection = protection = identifier, self._cache.load(identifier, response.content, url)
        return protection

    def _batch_size(self, requested: int) -> int:
        """Images of the next request: as many as requested, at most as many as the service takes.

        The result may change between two requests, since another bundle has other limits.
        """
        if requested < 1:
            raise ConfigError(f"batch is {requested}; allowed is 1 or more")
        identifier, _ = self.protection()  # before the limits: its errors say more
        limit = self._max_images
        if limit is None or limit[0] != identifier:
            description = self.model()
            try:
                upload, limits = description["upload"], description["limits"]
                size = int(upload["height"] * upload["width"] * upload["channels"])
                num = min(int(limits["images"]), (int(limits["body_bytes"]) - NPY_HEADER) // size)
            except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
                raise RemoteError(f"{self._session.url} states no limits; is it a raypp classifier?") from error
            self._max_images = limit = identifier, num
        return max(1, min(requested, limit[1]))

    def _protect(self, images: dict[int, Image], errors: Errors | None = None) -> _Batch:
        """Read and protect images by index.

        ``errors`` collects the errors of images, which the batch then lacks; without it they are raised.
        """
        identifier, bundle = self.protection()
        if not images:
            raise DataError("no image was given; allowed is one or more")
        loaded: dict[int, Pixels] = {}
        for index, image in images.items():
            if errors is not None and index in errors:  # of an attempt with an earlier protection
                continue
            try:
                loaded[index] = load_image(image, bundle, f"image {index + 1}")
            except DataError as error:
                _add_error(errors, index, error)
        if not loaded:
            empty = np.empty((0, *bundle.image_size, bundle.channels), np.uint8)
            return _Batch(identifier, [], empty, empty)
        plain = np.stack(list(loaded.values()))
        protected = protect_images(bundle, plain)
        unprotected = find_unprotected(plain, protected)
        indices = list(loaded)
        for i in unprotected:
            message = f"image {indices[i] + 1} is left unchanged by the protection; nothing was sent"
            _add_error(errors, indices[i], DataError(message))
        rest = [i for i in range(len(indices)) if i not in unprotected]
        return _Batch(identifier, [indices[i] for i in rest], plain[rest], protected[rest])

    def _send_protected(
        self, path: str, images: dict[int, Image], errors: Errors | None = None
    ) -> tuple[_Batch, httpx.Response]:
        """Protect images and send them; on 409 fetch the new protection and repeat."""
        for attempt in range(MAX_REFRESHES + 1):
            if attempt:
                self._fetch_protection()
            batch = self._protect(images, errors)
            if not batch.indices:
                return batch, httpx.Response(204)
            response = self._session.post_images(path, batch.protected, batch.protection)
            if response.status_code != 409:
                break
        return batch, response

    def _classify(self, images: dict[int, Image], errors: Errors | None) -> list[tuple[int, Prediction]]:
        """Predictions of the images of one batch, by index; ``errors`` as in :meth:`_protect`."""
        batch, response = self._send_protected("/classifier/v1/classify", images, errors)
        indices = batch.indices
        if not indices:
            return []
        if response.status_code == 200:
            if response.headers.get("Raypp-Protection", batch.protection) != batch.protection:
                self._protection = None  # the next request uses the new one
            with parsing(response):
                return list(zip(indices, parse_predictions(response), strict=True))
        if response.status_code == 413 and len(indices) > 1:  # a new bundle has larger images, or lower limits
            self._max_images = None
            halves = indices[: len(indices) // 2], indices[len(indices) // 2 :]
            return [item for half in halves for item in self._classify({i: images[i] for i in half}, errors)]
        problem = RemoteError.from_response(response)
        if errors is None or problem.code != "not-protected" or not (refused := parse_refused(response, indices)):
            raise problem
        message = "the service takes its protected form for a plain image"
        errors |= {i: RemoteError(message, problem.status, problem.code) for i in refused}
        return self._classify(images, errors)  # without the images that the service has refused


def _add_error(errors: Errors | None, index: int, error: RayppError) -> None:
    if errors is None:
        raise error
    errors[index] = error


def _report_errors(on_error: ErrorHandler | None, images: list[Image], errors: Errors | None) -> None:
    if on_error is not None and errors is not None:
        for index in sorted(errors):
            on_error(images[index], errors[index])


def _in_thread(
    method: Callable[Concatenate[Client, Arguments], Result],
) -> Callable[Concatenate[AsyncClient, Arguments], Coroutine[Any, Any, Result]]:
    @functools.wraps(method)
    async def call(self: AsyncClient, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        function = functools.partial(method, self._client, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._threads, function)

    return call


class AsyncClient:
    """:class:`Client` for asyncio. Each call runs in a thread of the client, at most :data:`MAX_THREADS` at once.

    A cancelled call stops waiting; its thread ends with the request.
    """

    def __init__(self, url: str, **options: Any) -> None:
        self._client = Client(url, **options)
        self._threads = ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="raypp-client")

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        self._client.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    model = _in_thread(Client.model)
    protection = _in_thread(Client.protection)
    protect = _in_thread(Client.protect)
    attacks = _in_thread(Client.attacks)
    reconstruct = _in_thread(Client.reconstruct)
    _batch_size = _in_thread(Client._batch_size)
    _classify = _in_thread(Client._classify)

    async def classify(self, images: Sequence[Image]) -> list[Prediction]:
        """See :meth:`Client.classify`."""
        return [prediction async for _, prediction in self.stream(images)]

    async def stream(
        self, images: Iterable[Image], batch: int = BATCH, on_error: ErrorHandler | None = None
    ) -> AsyncIterator[tuple[Image, Prediction]]:
        """See :meth:`Client.stream`."""
        remaining = iter(images)
        while part := list(islice(remaining, await self._batch_size(batch))):
            errors: Errors | None = None if on_error is None else {}
            for index, prediction in await self._classify(dict(enumerate(part)), errors):
                yield part[index], prediction
            _report_errors(on_error, part, errors)
