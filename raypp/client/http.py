"""Clients of a served classifier. They protect every image on this machine before they send it.

No method accepts a protected image: each sends only what its own protection has just produced. A client fetches this
protection once, checks it against the hashes of its manifest and caches it on disk.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import numpy as np

from raypp.bundle.load import PublicBundle
from raypp.client.offline import protect_images
from raypp.client.protection import Image, ProtectionCache, find_unprotected, load_image
from raypp.client.session import RemoteError, Session, parsing, remote_error
from raypp.utils.errors import ConfigError, DataError, RayppError
from raypp.utils.images import Pixels, decode

BATCH = 64  # images of a request: fills the batches of a classifier
NPY_HEADER = 1024  # bytes; an upper bound
MAX_REFRESHES = 2  # of the protection within one request, after the service has switched to another bundle

Errors = dict[int, RayppError]
"""Errors of single images by their index in the batch."""


@dataclass(frozen=True)
class Prediction:
    """The predicted class of one image, the most likely classes with their probabilities, and the model's version."""

    label: str
    probability: float
    top: tuple[tuple[str, float], ...]
    model: str


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
        self._cache = ProtectionCache(cache, key)
        self._pin = pin
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
        description: dict[str, Any] = self._session.get_json("/classifier/v1/model")
        return description

    def protection(self) -> tuple[str, PublicBundle]:
        """The SHA-256 of the protection in use, and the protection; the first call fetches it."""
        return self._protection or self._fetch_protection()

    def protect(self, images: Sequence[Image]) -> tuple[Pixels, Pixels]:
        """Images, fitted to the protection's size, and their protected forms, both uint8 (N, H, W, C)."""
        batch = self._protect(dict(enumerate(images)))
        return batch.plain, batch.protected

    def attacks(self) -> dict[str, Any]:
        """The attacks that the service offers, their threat levels and measured leakage."""
        description: dict[str, Any] = self._session.get_json("/attack/v1")
        return description

    def reconstruct(self, attack: str, images: Sequence[Image]) -> list[Pixels]:
        """Protect images and attack them by the service; returns estimates uint8 (H, W, C), in order.

        One request, so no more images than the service's ``max_images`` of that attack.
        """
        batch, response = self._send_protected(f"/attack/v1/{quote(attack, safe='')}", dict(enumerate(images)))
        if response.status_code != 200:
            raise remote_error(response)
        with parsing(response):
            return [
                decode(base64.b64decode(item["png"]), name=f"reconstruction {number}", channels=batch.plain.shape[3])
                for number, item in enumerate(response.json()["reconstructions"], 1)
            ]

    def classify(self, images: Sequence[Image]) -> list[Prediction]:
        """Protect images and classify them by the service; returns a prediction for each, in order."""
        return [prediction for _, prediction in self.stream(images)]

    def stream(
        self, images: Iterable[Image], batch: int = BATCH, on_error: Callable[[Image, RayppError], None] | None = None
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
            report_errors(on_error, part, errors)

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
        """Read and protect images.

        Args:
            images: by index.
            errors: collects the errors of images, which the batch then lacks; without it they are raised.
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
        kept = [i for i in range(len(indices)) if i not in unprotected]
        return _Batch(identifier, [indices[i] for i in kept], plain[kept], protected[kept])

    def _send_protected(
        self, path: str, images: dict[int, Image], errors: Errors | None = None
    ) -> tuple[_Batch, httpx.Response]:
        """Protect images and send them; on 409 fetch the new protection and repeat."""
        refreshes = 0
        while True:
            batch = self._protect(images, errors)
            if not batch.indices:
                return batch, httpx.Response(204)
            response = self._session.post_images(path, batch.protected, batch.protection)
            if response.status_code != 409 or refreshes == MAX_REFRESHES:
                return batch, response
            refreshes += 1
            self._fetch_protection()

    def _classify(self, images: dict[int, Image], errors: Errors | None) -> list[tuple[int, Prediction]]:
        """Predictions of the images of one batch, by index; ``errors`` as in :meth:`_protect`."""
        predictions = None
        while predictions is None:  # once more without the images that the service has refused
            images = {index: image for index, image in images.items() if errors is None or index not in errors}
            if not images:
                return []
            predictions = self._classify_once(images, errors)
        return predictions

    def _classify_once(self, images: dict[int, Image], errors: Errors | None) -> list[tuple[int, Prediction]] | None:
        """Predictions of the images; None if the service has refused some, whose ``errors`` are set."""
        batch, response = self._send_protected("/classifier/v1/classify", images, errors)
        indices = batch.indices
        if not indices:
            return []
        if response.status_code == 200:
            if response.headers.get("Raypp-Protection", batch.protection) != batch.protection:
                self._protection = None  # the next request uses the new one
            with parsing(response):
                return list(zip(indices, _parse_predictions(response), strict=True))
        if response.status_code == 413 and len(indices) > 1:  # a new bundle has larger images, or lower limits
            self._max_images = None
            halves = indices[: len(indices) // 2], indices[len(indices) // 2 :]
            return [item for half in halves for item in self._classify({i: images[i] for i in half}, errors)]
        problem = remote_error(response)
        if errors is None or problem.code != "not-protected" or not (refused := _parse_refused(response, indices)):
            raise problem
        message = "the service takes its protected form for a plain image"
        errors |= {i: RemoteError(message, problem.status, problem.code) for i in refused}
        return None


def _add_error(errors: Errors | None, index: int, error: RayppError) -> None:
    if errors is None:
        raise error
    errors[index] = error


def report_errors(
    on_error: Callable[[Image, RayppError], None] | None, images: list[Image], errors: Errors | None
) -> None:
    if on_error is not None and errors is not None:
        for index in sorted(errors):
            on_error(images[index], errors[index])


def _parse_predictions(response: httpx.Response) -> list[Prediction]:
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


def _parse_refused(response: httpx.Response, indices: list[int]) -> list[int]:
    """Indices of the images that the service refuses as not protected."""
    with parsing(response):
        positions = response.json().get("images") or []
        if not all(type(position) is int and 0 <= position < len(indices) for position in positions):
            raise ValueError("positions of images that were not sent")
        return [indices[position] for position in positions]
