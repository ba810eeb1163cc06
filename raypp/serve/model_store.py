"""What is served: a bundle, loaded and checked, and how a newer one takes its place while requests are answered.

A *shelf* is a folder with bundles under ``versions/`` and a file ``live.json`` that names one of them. A service looks
at that file every few seconds. What it names next is loaded and checked beside the bundle that is being served, and
takes over only if it does what it did when it was made; else the old one stays and the reason is shown.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from raypp.bundle.manifest import MANIFEST
from raypp.serve.loaded_model import NUM_KEPT, LoadedModel, load_model
from raypp.utils.errors import BundleError, RayppError, StorageError
from raypp.utils.storage import Storage

ACTIVE_FILE = "live.json"
RETRY_SECONDS = 60.0  # until a bundle that did not work is tried again


# What is live


def is_model_repository(location: str | Path) -> bool:
    """Whether a folder is a shelf, not a bundle."""
    return Storage(location).exists(ACTIVE_FILE)


@dataclass(frozen=True)
class ModelRef:
    """The bundle that a location names."""

    location: str
    version: str
    published: str | None
    """When it was made live, of a shelf."""


def current(location: str | Path) -> ModelRef:
    """Which bundle a location names.

    Args:
        location: a bundle, or a shelf.

    Raises:
        StorageError: neither is there, or it cannot be read.
    """
    storage = Storage(location)
    if storage.local:  # through links such as runs/latest, so that all files are read of the same run
        storage = Storage(storage.path.resolve())
    if storage.exists(ACTIVE_FILE):
        named = _named(storage)
        version = named["version"]
        if version is None:
            raise StorageError(f"{storage.uri}/{ACTIVE_FILE} is damaged; raypp publish writes it anew")
        return ModelRef(storage.folder(f"versions/{version}").uri, version, named["published"])
    if not storage.exists(MANIFEST):
        if storage.exists(f"bundle/{MANIFEST}"):
            raise StorageError(f"{storage.uri} is a run; its bundle is {storage.folder('bundle').uri}")
        raise StorageError(f"{storage.uri} is neither a bundle nor a shelf of published ones")
    return ModelRef(storage.uri, hashlib.sha256(storage.read(MANIFEST)).hexdigest()[:16], None)


def _previous(location: str | Path) -> str | None:
    """Where the bundle lies that was live on a shelf before the one that is named now."""
    storage = Storage(location)
    try:
        version = _named(storage)["previous"] if storage.exists(ACTIVE_FILE) else None
    except RayppError:
        return None
    return storage.folder(f"versions/{version}").uri if version else None


def _named(storage: Storage) -> dict[str, str | None]:
    """The versions that a shelf names: what is live, since when, and what was before; all None where its file is
    damaged."""
    try:
        found = json.loads(storage.read(ACTIVE_FILE))
        return {
            "version": str(found["version"]),
            "previous": found.get("previous"),
            "published": found.get("published"),
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        return {"version": None, "previous": None, "published": None}


class ModelManager:
    """The bundle that is live at a location, and those before it.

    Args:
        location: a bundle or a shelf.
        prepare: what else a service makes of a bundle before it takes over; see :meth:`prepared`.

    Raises:
        RayppError: there is none that works; later ones that do not are refused and the old one stays.
    """

    def __init__(
        self,
        location: str | Path,
        device: torch.device | None = None,
        prepare: Callable[[LoadedModel], Any] | None = None,
    ) -> None:
        self.location, self.device, self.prepare = location, device, prepare
        self.rejected: dict[str, str] | None = None
        self.looked = 0.0  # when, in monotonic seconds
        self._refused: tuple[ModelRef, float] | None = None  # and until when it is not tried again
        self._lock = threading.Lock()
        self._prepared: dict[str, Any] = {}
        named = current(location)
        try:
            self._kept: list[LoadedModel] = [self._load(named.location)]
        except Exception as error:  # whatever a damaged bundle makes its loader raise
            before = _previous(location)
            if before is None:
                raise
            self._kept = [self._load(before)]  # a replica that starts while a bad bundle is named serves the one before
            self._refuse(named, error)

    def _load(self, where: str) -> LoadedModel:
        served = load_model(where, self.device, attacks=self.prepare is not None)
        if self.prepare is not None:
            self._prepared[served.version] = self.prepare(served)
        return served

    def _refuse(self, named: ModelRef, error: Exception) -> None:
        # A store may be away for a moment, and a bundle may be on its way.
        wait = 0.0 if isinstance(error, OSError | StorageError) else RETRY_SECONDS
        self._refused = named, time.monotonic() + wait
        self.rejected = {"version": named.version, "reason": _reason(error)}
        if named.published is not None:
            self.rejected["published"] = named.published

    def prepared(self, served: LoadedModel) -> Any:
        """What ``prepare`` made of a bundle; None if it has just been dropped."""
        return self._prepared.get(served.version)

    @property
    def now(self) -> LoadedModel:
        return self._kept[-1]

    def refresh(self) -> bool:
        """Look whether another bundle has become live and take it over; blocks while that is loaded. Whether it was."""
        with self._lock:
            self.looked = time.monotonic()
            try:
                named = current(self.location)
            except Exception as error:  # a store that is away for a moment takes nothing down, whatever it raises
                self.rejected = {"version": "unknown", "reason": _reason(error)}
                return False
            if named.version == self.now.version:
                self.rejected = self._refused = None
                return False
            if self._refused is not None and self._refused[0] == named and time.monotonic() < self._refused[1]:
                return False
            try:
                found = next((s for s in self._kept if s.version == named.version), None)
                served = found or self._load(named.location)
            except Exception as error:  # whatever a damaged bundle makes its loader raise: the old one stays
                self._refuse(named, error)
                return False
            self.rejected = self._refused = None
            # One list takes the other's place: who looks at the same time sees the old or the new one, whole.
            self._kept = ([s for s in self._kept if s is not served] + [served])[-NUM_KEPT:]
            kept = {s.version for s in self._kept}
            self._prepared = {version: made for version, made in self._prepared.items() if version in kept}
            return True

    def of(self, protection: str | None) -> LoadedModel | None:
        """The newest bundle in memory with this protection, the live one for None."""
        if protection is None:
            return self.now
        return next((s for s in reversed(self._kept) if s.protection == protection), None)


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, RayppError) else f"{type(error).__name__} while it was loaded"


@dataclass(frozen=True)
class PublishedModel:
    version: str
    location: str
    previous: str | None
    published: str
    """When."""


@contextmanager
def publishing(
    bundle: str | Path, shelf: str | Path, check: Callable[[LoadedModel], Any] | None = None
) -> Iterator[PublishedModel]:
    """Check a bundle, put it on a shelf and make it live; if the body raises, what was live before is so again.

    Args:
        check: what else a service makes of a bundle before it takes over, tried here first.

    Raises:
        RayppError: the bundle does not work, and nothing has changed; or the shelf cannot be written.
    """
    served = load_model(bundle, attacks=check is not None)
    if check is not None:
        try:
            check(served)
        except Exception as error:  # whatever damaged attacks make their loader raise
            raise BundleError(f"the attacks of bundle {str(bundle)!r} do not load: {_reason(error)}") from error
    storage = Storage(shelf)
    if storage.exists(MANIFEST):
        raise BundleError(f"{storage.uri} is a bundle itself; allowed is a new or empty folder, or a shelf")
    version = served.version
    place = storage.folder(f"versions/{version}")
    if not place.exists(MANIFEST):
        with Storage(bundle).download("") as folder:
            storage.upload(folder, f"versions/{version}", last=MANIFEST)
    if load_model(place.uri).version != version:  # what was uploaded, not what was meant to be
        raise BundleError(f"{place.uri} is not the bundle that was published; remove that folder")
    before = storage.read(ACTIVE_FILE) if storage.exists(ACTIVE_FILE) else None
    named = _named(storage) if before else {"version": None, "previous": None}
    # Of a bundle that is live already, the one before it stays the one to go back to.
    previous = named["previous"] if named["version"] == version else named["version"]
    now = {"version": version, "previous": previous, "published": datetime.now(UTC).isoformat(timespec="seconds")}
    written = (json.dumps(now) + "\n").encode()
    storage.write(ACTIVE_FILE, written)
    try:
        yield PublishedModel(version, place.uri, previous, str(now["published"]))
    except BaseException:
        if storage.read(ACTIVE_FILE) == written:  # else somebody has published since, and this is not ours to undo
            if before is not None:
                storage.write(ACTIVE_FILE, before)
            else:
                storage.remove(ACTIVE_FILE)
        raise
