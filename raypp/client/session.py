"""Requests and responses of the HTTP client, without input and output."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import random
import time
import zipfile
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import httpx
import numpy as np

import raypp
from raypp.bundle.load import PublicBundle, load_public
from raypp.bundle.manifest import MANIFEST
from raypp.client.offline import protect_images, read_image
from raypp.utils.errors import BundleError, ConfigError, DataError, RayppError
from raypp.utils.images import Pixels, decode, resize_and_center_crop, to_grayscale
from raypp.utils.keys import Key
from raypp.utils.network import is_loopback
from raypp.utils.storage import new_folder

BATCH = 64  # images of a request: enough that the classifier works on full batches
NPY = "application/x-npy"
NPY_HEADER = 1024  # bytes, and more than one takes
MAX_ARCHIVE = 2**30  # bytes of a public part, before and after unpacking
MOST_ANEW = 2  # times that a request is made anew since another bundle has become live
CONNECT_SECONDS = 5.0  # for a connection: a host that is not there shall be known before a request would have ended
QUIET_SECONDS = 1.0  # of trying again that nobody is told of
STARTING_SECONDS = 5.0  # for which a client that has met no service yet takes a 404 of Serve's for a start
SAME = 2.0  # grey levels, in the mean, that an image and what protects it must differ by at least
FLAT = 8  # grey levels between the darkest and the lightest value of an image that shows nothing
RETRIED = frozenset({408, 429, 500, 502, 503, 504})
"""Answers after which the same request may be sent again: classifying changes nothing on the server."""

Image = str | Path | bytes | Pixels
"""A file, the bytes of one, or uint8 (H, W, C)."""


class RemoteError(RayppError):
    """The service refuses a request, or cannot be reached.

    Attributes:
        status: HTTP status, or None where there was no answer.
        code: the problem's stable name, such as ``not-protected``, or None.
    """

    def __init__(self, message: str, status: int | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


@dataclass(frozen=True)
class Prediction:
    """What the cloud makes of one image: its class, the likeliest ones with their probabilities, and by which model."""

    label: str
    probability: float
    top: tuple[tuple[str, float], ...]
    model: str


Errors = dict[int, RayppError]
"""What is wrong with single images, by their places."""

Step = Generator["Request | float", "httpx.Response | Exception | None", Any]
"""What a client does, without doing it: gives requests to send and seconds to wait, takes answers."""


@dataclass(frozen=True)
class Request:
    """One HTTP request."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes | None = None


class ProtectingSession:
    """Everything that the two clients have in common: what to send, and what an answer means.

    Args and errors: see :class:`Client`.
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
        try:
            parts, _ = urlsplit(url), httpx.URL(url)
        except (ValueError, httpx.InvalidURL):
            parts = urlsplit("")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"url is {url!r}; allowed is http:// or https:// with a host")
        if token is not None and not (token.isascii() and token.isprintable()):
            raise ConfigError("token holds characters that no token has; is it the right file?")
        if token is not None and parts.scheme == "http" and not is_loopback(parts.hostname):
            raise ConfigError(f"url is {url!r}: a token is sent over https only, or to this machine")
        if not (timeout > 0 and patience >= 0):
            raise ConfigError(f"timeout is {timeout} and patience {patience}; allowed are times above zero")
        self.url = url.rstrip("/").removesuffix("/classifier")
        self.timeout = httpx.Timeout(timeout, connect=min(timeout, CONNECT_SECONDS))
        self.pin, self.patience, self.on_wait = pin, patience, on_wait
        self._key = Key.read(key) if key is not None else None
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        self._cache = Path(cache) if cache is not None else Path(home) / "raypp" / "protections"
        self._headers = {"User-Agent": f"raypp/{raypp.__version__}"}
        if token is not None:
            self._headers["Authorization"] = f"Bearer {token}"
        self._bundle: tuple[str, PublicBundle] | None = None
        self._limits: tuple[str, tuple[int, int]] | None = None  # by the protection that they belong to
        # A proxy of the environment must not see what is meant for this machine.
        self.trust_env = not is_loopback(parts.hostname)

    # Requests with retries

    def request(self, call: Request) -> dict[str, Any]:
        """A call as httpx takes it."""
        return {"method": call.method, "url": self.url + call.path, "headers": call.headers, "content": call.body}

    def ask(self, call: Request) -> Step:
        """Send until there is an answer that is worth something, or patience ends."""
        begin, tries = time.monotonic(), 0
        end = begin + self.patience
        while True:
            answer = yield call
            if isinstance(answer, httpx.Response) and answer.status_code not in RETRIED:
                # Serve's proxy says so also while a service that it had starts again.
                starting = answer.status_code == 404 and "/-/routes" in answer.text
                known = self._bundle is not None or time.monotonic() < begin + STARTING_SECONDS
                if not (starting and known and call.path.startswith("/classifier/")):
                    return answer
            wait = _wait(answer, tries)
            now = time.monotonic()
            if isinstance(answer, httpx.Response):
                if now + wait > end:
                    return answer
                failure = _problem(answer)
            else:
                failure = RemoteError(f"{self.url} does not answer: {_reason(answer)}")
                if now + wait > end:
                    raise failure from answer
            if self.on_wait is not None and now - begin > QUIET_SECONDS:
                self.on_wait(str(failure), end - now)
            tries += 1
            yield wait

    def get(self, path: str, headers: dict[str, str] | None = None) -> Step:
        answer = yield from self.ask(Request("GET", path, self._headers | (headers or {})))
        if answer.status_code not in (200, 304):
            raise _problem(answer)
        return answer

    def model(self) -> Step:
        answer = yield from self.get("/classifier/v1/model")
        return _json(answer)

    def protection(self, *, anew: bool = False) -> Step:
        """The protection that the service asks for: fetched once, or again where it says that it serves another one."""
        known = self._bundle
        if known is not None and not anew:
            return known
        # Asked for only by a name that this service is known by: what else is on disk is none of its business.
        held = self.pin or (known[0] if known is not None else None)
        kept = held is not None and (self._cache / held / MANIFEST).is_file()
        headers = {"If-None-Match": f'"{held}"'} if kept else {}
        answer = yield from self.get("/classifier/v1/protection", headers)
        identifier = answer.headers.get("etag", "").strip().removeprefix("W/").strip('"')  # proxies weaken it
        self._bundle = known = identifier, self._take(identifier, answer.content)
        return known

    def batch(self, wanted: int) -> Step:
        """How many images a request may hold, by what the service says of its limits, and not more than wanted.

        Raises:
            ConfigError: fewer than one are wanted.
        """
        if wanted < 1:
            raise ConfigError(f"batch is {wanted}; allowed is 1 or more")
        # First the protection: what is wrong with it is worth more to know than what is wrong with limits.
        identifier, _ = yield from self.protection()
        if self._limits is None or self._limits[0] != identifier:  # another bundle may take images of another size
            about = yield from self.model()
            try:
                upload, limits = about["upload"], about["limits"]
                size = upload["height"] * upload["width"] * upload["channels"]
                images, bytes_of_body = int(limits["images"]), int(limits["body_bytes"])
                self._limits = identifier, (images, (bytes_of_body - NPY_HEADER) // int(size))
            except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
                raise RemoteError(f"{self.url} does not say what it takes; is it a raypp classifier?") from error
        return max(1, min(wanted, *self._limits[1]))

    def _take(self, identifier: str, archive: bytes) -> PublicBundle:
        """Check a public part, keep it on disk and load it."""
        if self.pin is not None and identifier != self.pin:
            raise RemoteError(
                f"{self.url} serves the protection {identifier}, not {self.pin}, which this client is pinned to"
            )
        if len(identifier) != 64 or not set(identifier) <= set("0123456789abcdef"):
            raise RemoteError(f"{self.url} names no protection; is it a raypp classifier?")
        folder = self._cache / identifier
        if not (folder / MANIFEST).is_file():
            files = _unpack(archive, self.url)
            if hashlib.sha256(files.get(MANIFEST, b"")).hexdigest() != identifier:
                raise BundleError(f"the protection from {self.url} is not the one that it names; nothing was sent")
            self._cache.mkdir(parents=True, exist_ok=True)
            try:
                with new_folder(folder) as aside:
                    for name, data in files.items():
                        (aside / name).write_bytes(data)
            except RayppError:
                if not (folder / MANIFEST).is_file():  # else another client was quicker
                    raise
        if hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest() != identifier:
            raise BundleError(f"{str(folder)!r} was altered; remove it and it is fetched anew")
        try:
            needed = json.loads((folder / "protection.json").read_text()).get("key") is not None
        except (OSError, ValueError, AttributeError) as error:
            raise BundleError(f"{str(folder)!r} was altered; remove it and it is fetched anew") from error
        bundle = load_public(folder, self._key if needed else None)
        if not bundle.protection.hides:
            raise BundleError(f"{self.url} asks for images without any protection; nothing was sent")
        return bundle

    def protected(self, images: Sequence[Image], errors: Errors | None = None) -> Step:
        """The protection's SHA-256, images as it takes them, and what it makes of them, both uint8 (N, H, W, C).

        Args:
            errors: by their places, images to leave out; those that cannot be read are added. Without it they raise.
        """
        identifier, bundle = yield from self.protection()
        if not len(images):
            raise DataError("no image was given; allowed is one or more")
        plain: dict[int, Pixels] = {}
        for place, image in enumerate(images):
            if errors is not None and place in errors:
                continue
            try:
                # Made small as soon as it has been read: 64 photographs would take gigabytes.
                plain[place] = resize_and_center_crop(
                    _channels(_read(image, place + 1), bundle.channels), bundle.image_size
                )
            except DataError as error:
                if errors is None:
                    raise
                errors[place] = error
        while plain:
            stacked = np.stack(list(plain.values()))
            hidden = protect_images(bundle, stacked)
            if (shown := _shown(stacked, hidden)) is None:
                return identifier, stacked, hidden
            place = list(plain)[shown]
            problem = DataError(f"image {place + 1} comes out of the protection as it went in; nothing was sent")
            if errors is None:
                raise problem
            errors[place] = problem
            del plain[place]
        nothing = np.empty((0, *bundle.image_size, bundle.channels), np.uint8)
        return identifier, nothing, nothing

    def classify(self, images: Sequence[Image], errors: Errors | None = None) -> Step:
        """Protect and send the images of one request; returns each with its prediction.

        Args:
            errors: where what is wrong with single images goes, by their places; the others are classified. Without it
                one of them raises.
        """
        anew = 0
        while True:
            identifier, _, hidden = yield from self.protected(images, errors)
            kept = [place for place in range(len(images)) if errors is None or place not in errors]
            if not kept:
                return []
            headers = self._headers | {"Content-Type": NPY, "Raypp-Protection": identifier}
            answer = yield from self.ask(Request("POST", "/classifier/v1/classify", headers, _npy(hidden)))
            if answer.status_code == 200:
                live = answer.headers.get("Raypp-Protection")
                if live is not None and live != identifier:
                    self._bundle = None  # a newer one is live: the next request protects with it
                with _understood(answer):
                    found = answer.json()
                    predictions = [_prediction(image, found["model"]) for image in found["images"]]
                    return [(images[place], made) for place, made in zip(kept, predictions, strict=True)]
            if answer.status_code == 409 and anew < MOST_ANEW:
                anew += 1
                yield from self.protection(anew=True)
                continue
            if answer.status_code == 413 and len(images) > 1:  # a newer bundle takes larger images, or fewer of them
                self._limits = None
                halves = yield from self._classify_halves(images, errors)
                return halves
            problem = _problem(answer)
            refused = _refused(answer, len(kept)) if errors is not None and problem.code == "not-protected" else []
            if errors is None or not refused:
                raise problem
            for place in refused:
                errors[kept[place]] = RemoteError(
                    "the service takes its protected form for a plain image", problem.status, problem.code
                )

    def _classify_halves(self, images: Sequence[Image], errors: Errors | None) -> Step:
        """As :meth:`classify`, in two requests."""
        middle = len(images) // 2
        predictions = []
        for begin, part in ((0, images[:middle]), (middle, images[middle:])):
            errors_of_part: Errors | None = None
            if errors is not None:
                errors_of_part = {k - begin: error for k, error in errors.items() if 0 <= k - begin < len(part)}
            predictions += yield from self.classify(part, errors_of_part)
            if errors is not None and errors_of_part is not None:
                errors |= {k + begin: error for k, error in errors_of_part.items()}
        return predictions

    def attacks(self) -> Step:
        answer = yield from self.get("/attack/v1")
        return _json(answer)

    def reconstruct(self, attack: str, images: Sequence[Image]) -> Step:
        """Protect images and have them attacked."""
        for last in (False, True):
            identifier, plain, hidden = yield from self.protected(images)
            headers = self._headers | {"Content-Type": NPY, "Raypp-Protection": identifier}
            answer = yield from self.ask(Request("POST", f"/attack/v1/{quote(attack, safe='')}", headers, _npy(hidden)))
            if answer.status_code == 409 and not last:
                yield from self.protection(anew=True)
                continue
            if answer.status_code != 200:
                raise _problem(answer)
            with _understood(answer):
                return [
                    decode(base64.b64decode(found["png"]), name=f"reconstruction {number}", channels=plain.shape[3])
                    for number, found in enumerate(answer.json()["reconstructions"], 1)
                ]
        raise AssertionError("unreachable")


def _shown(plain: Pixels, hidden: Pixels) -> int | None:
    """The first image that its protection leaves as it is, as one by an untrue cloud would, or a key by bad luck.

    Images of one colour are left out: there is nothing in them to hide.
    """
    if plain.shape != hidden.shape:
        return None
    apart = np.abs(plain.astype(np.int16) - hidden).reshape(len(plain), -1).mean(1)
    values = plain.reshape(len(plain), -1).astype(np.int16)
    same = (apart < SAME) & (values.max(1) - values.min(1) > FLAT)
    return int(same.argmax()) if same.any() else None


def _wait(answer: httpx.Response | Exception | None, tries: int) -> float:
    """Seconds until the next try: what the service asks for, else twice as long each time, with chance in it."""
    asked = answer.headers.get("retry-after", "") if isinstance(answer, httpx.Response) else ""
    least = min(float(asked), LONGEST_WAIT) if asked.isascii() and asked.isdigit() else 0.0
    return float(least + random.uniform(0.5, 1.0) * min(0.1 * 2 ** min(tries, MAX_DOUBLINGS), 5.0))


def _reason(error: Exception | None) -> str:
    return str(error).strip() or type(error).__name__


def _problem(answer: httpx.Response) -> RemoteError:
    """An answer that is no success, as an error in the service's own words."""
    try:
        document = answer.json()
        detail, code = str(document["detail"]), str(document.get("type", "")).rpartition(":")[2] or None
    except (ValueError, KeyError, TypeError, AttributeError):
        detail, code = answer.text.strip().splitlines()[0][:200] if answer.text.strip() else "no reason given", None
    return RemoteError(f"{answer.request.url.host} answers {answer.status_code}: {detail}", answer.status_code, code)


def _json(answer: httpx.Response) -> Any:
    try:
        return answer.json()
    except ValueError as error:
        raise RemoteError(f"{answer.request.url} gives no JSON; is it a raypp service?", answer.status_code) from error


@contextmanager
def _understood(answer: httpx.Response) -> Iterator[None]:
    """An answer that is not what a raypp service gives is said to be so."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, DataError) as error:
        raise RemoteError(
            f"{answer.request.url} answers with something else than a raypp service does", answer.status_code
        ) from error


def _refused(answer: httpx.Response, num: int) -> list[int]:
    """Places of the images that a service names as not protected; none where it names what was not sent."""
    with _understood(answer):
        places = answer.json().get("images") or []
        if not all(type(place) is int and 0 <= place < num for place in places):
            raise ValueError("places of other images")
        return list(places)


def _prediction(found: dict[str, Any], model: str) -> Prediction:
    top = tuple((str(c["class"]), float(c["probability"])) for c in found["top"])
    return Prediction(str(found["class"]), float(found["probability"]), top, model)


def _unpack(archive: bytes, url: str) -> dict[str, bytes]:
    """Files of a public part by name: flat, listed once, and no larger than allowed."""
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as opened:
            infos = opened.infolist()
            names = [info.filename for info in infos]
            plain = all(name == Path(name).name and name not in ("", ".", "..") for name in names)
            # As services write it; a decompressor of another kind raises what nobody expects.
            plain &= all(info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 1 for info in infos)
            if not plain or len(set(names)) != len(names) or sum(info.file_size for info in infos) > MAX_ARCHIVE:
                raise BundleError(f"the protection from {url} holds files that no protection has; nothing was sent")
            return {info.filename: opened.read(info) for info in infos}
    except (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError, OSError) as error:
        raise BundleError(f"the protection from {url} is damaged: {error}; nothing was sent") from error


def _npy(images: Pixels) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, images, allow_pickle=False)
    return buffer.getvalue()


def _read(image: Image, number: int) -> Pixels:
    """A plain image as uint8 (H, W, 3), or as it was given."""
    if isinstance(image, str | Path):
        return read_image(Path(image))
    if isinstance(image, bytes):
        return decode(image, name=f"image {number}")
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] in (1, 3):
        if not image.size:
            raise DataError(f"image {number} is {image.shape[0]} x {image.shape[1]}; it has no pixel")
        return image
    raise DataError(f"image {number} is no file, bytes or uint8 array (H, W, C) with 1 or 3 channels")


def _channels(image: Pixels, channels: int) -> Pixels:
    if image.shape[2] == channels:
        return image
    return to_grayscale(image) if channels == 1 else np.repeat(image, 3, axis=2)


MAX_DOUBLINGS = 10  # of the wait between two tries, which has its limit long before
LONGEST_WAIT = 30.0  # seconds between two tries
