"""Model repositories, and the models that a service loads from one.

A model repository is a folder with bundles under ``versions/`` and the file ``live.json``, which names the active
version. Services poll this file. They load and check a new version while the old one answers, and keep the old one if
the new one fails.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from raypp.bundle.locate import ACTIVE_FILE, VERSIONS, ActiveVersion, locate_bundle, read_active, split_choice
from raypp.bundle.manifest import MANIFEST
from raypp.serve.loaded_model import LoadedModel, load_model
from raypp.utils.errors import BundleError, RayppError, StorageError
from raypp.utils.storage import Storage

MAX_MODELS = 3  # in memory: clients that protected with an earlier one still get answers
RETRY_SECONDS = 60.0  # before the service tries a failed version again


@dataclass(frozen=True)
class ModelRef:
    """The active bundle of a location. Only a repository has a previous version and a time of publication."""

    location: str
    version: str
    previous: str | None = None
    published: str | None = None


def resolve_model(location: str | Path) -> ModelRef:
    """Find the active bundle of a location, see :func:`raypp.bundle.locate.locate_bundle`."""
    place, choice = split_choice(location)
    storage = _resolve_links(Storage(place))
    if choice is None and storage.exists(ACTIVE_FILE):
        active = read_active(storage)
        uri = storage.folder(f"{VERSIONS}/{active.version}").uri
        return ModelRef(uri, active.version, active.previous, active.published)
    bundle = _resolve_links(Storage(locate_bundle(location)))
    return ModelRef(bundle.uri, hashlib.sha256(bundle.read(MANIFEST)).hexdigest()[:16])


def _resolve_links(storage: Storage) -> Storage:
    """Follow links such as runs/latest, so that all files come from the same run."""
    return Storage(storage.path.resolve()) if storage.local else storage


class ModelManager:
    """The active model of a bundle or model repository, and the models before it.

    ``prepare`` builds the attachment of a model before it becomes active. RayppError is raised if no model loads at the
    start; later failures leave the old model active.
    """

    def __init__(self, location: str | Path, prepare: Callable[[LoadedModel], Any] | None = None) -> None:
        self.location, self.prepare = location, prepare
        self.rejected: dict[str, str] | None = None
        self.last_poll = 0.0  # monotonic seconds
        self._retry: tuple[ModelRef, float] | None = None  # the failed version, and the time to try it again
        self._lock = threading.Lock()
        ref = resolve_model(location)
        try:
            self._models = [self._load(ref.location)]
        except Exception as error:  # the loader of a damaged bundle can raise anything
            if not ref.previous:
                raise
            # A replica that starts with a damaged version uses the previous one.
            self._models = [self._load(Storage(location).folder(f"versions/{ref.previous}").uri)]
            self._reject(ref, error)

    def _load(self, location: str) -> LoadedModel:
        model = load_model(location, attacks=self.prepare is not None)
        return model if self.prepare is None else replace(model, attachment=self.prepare(model))

    def _reject(self, ref: ModelRef, error: Exception) -> None:
        # After an error of the storage the next poll tries again, since an outage may be short.
        wait = 0.0 if isinstance(error, OSError | StorageError) else RETRY_SECONDS
        self._retry = ref, time.monotonic() + wait
        self.rejected = {"version": ref.version, "reason": _reason(error)}
        if ref.published is not None:
            self.rejected["published"] = ref.published

    @property
    def active(self) -> LoadedModel:
        return self._models[-1]

    def refresh(self) -> bool:
        """Load a new active version; blocks meanwhile. Returns whether the active model has changed."""
        with self._lock:
            self.last_poll = time.monotonic()
            try:
                ref = resolve_model(self.location)
            except Exception as error:  # an outage of the storage must not stop the service
                self.rejected = {"version": "unknown", "reason": _reason(error)}
                return False
            is_new = ref.version != self.active.version
            if is_new:
                if self._retry is not None and self._retry[0] == ref and time.monotonic() < self._retry[1]:
                    return False
                try:
                    loaded = next((model for model in self._models if model.version == ref.version), None)
                    model = loaded or self._load(ref.location)
                except Exception as error:  # the loader of a damaged bundle can raise anything
                    self._reject(ref, error)
                    return False
                # One assignment: a concurrent reader sees either the old or the new list.
                self._models = [*(other for other in self._models if other is not model), model][-MAX_MODELS:]
            self.rejected = self._retry = None
            return is_new

    def get(self, protection: str | None) -> LoadedModel | None:
        """The newest model in memory with a protection; the active one for None."""
        if protection is None:
            return self.active
        return next((model for model in reversed(self._models) if model.protection == protection), None)


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, RayppError) else f"{type(error).__name__} while it was loaded"


def check_repository(repository: str | Path) -> Storage:
    """Open a model repository, or create it; raises RayppError if it is something else or cannot be written."""
    storage = Storage(repository)
    if storage.local and storage.path.is_file():
        raise BundleError(f"{storage.uri} is a file; allowed is a new or empty folder, or a model repository")
    storage.create()
    names = {name for name in storage.names() if not name.startswith(".")}
    if MANIFEST in names:
        raise BundleError(f"{storage.uri} is a bundle itself; allowed is a new or empty folder, or a model repository")
    if names and not names & {ACTIVE_FILE, VERSIONS}:
        raise BundleError(
            f"{storage.uri} holds {min(names)!r}; allowed is a new or empty folder, or a model repository"
        )
    probe = f".{uuid.uuid4().hex[:8]}.tmp"
    storage.write(probe, b"")
    storage.remove(probe)
    return storage


@contextmanager
def publishing(
    bundle: str | Path, repository: str | Path, check: Callable[[LoadedModel], Any] | None = None
) -> Iterator[ModelRef]:
    """Check a bundle, upload it to a model repository and make it active; undone if the body raises.

    ``check`` runs on the loaded bundle, as a service's ``prepare`` does. RayppError is raised if the bundle does not
    work, and nothing has changed, or if the repository cannot be written.
    """
    source = locate_bundle(bundle)
    version = _check_bundle(source, check)
    storage = check_repository(repository)
    target = storage.folder(f"{VERSIONS}/{version}")
    if not target.exists(MANIFEST):
        with Storage(source).download("") as folder:
            storage.upload(folder, f"{VERSIONS}/{version}", last=MANIFEST)
    if load_model(target.uri).version != version:  # verifies the upload
        raise BundleError(f"{target.uri} is not the bundle that was published; remove that folder")
    old_file = storage.read(ACTIVE_FILE) if storage.exists(ACTIVE_FILE) else None
    old: ActiveVersion | None = None
    if old_file is not None:
        with contextlib.suppress(StorageError):  # a damaged file is replaced
            old = read_active(storage)
    previous = None
    if old is not None:  # publishing the active bundle again keeps its predecessor for a rollback
        previous = old.previous if old.version == version else old.version
    published = datetime.now(UTC).isoformat(timespec="seconds")
    new_file = (json.dumps({"version": version, "previous": previous, "published": published}) + "\n").encode()
    storage.write(ACTIVE_FILE, new_file)
    try:
        yield ModelRef(target.uri, version, previous, published)
    except BaseException:
        if storage.read(ACTIVE_FILE) == new_file:  # else another publication has replaced it since
            if old_file is not None:
                storage.write(ACTIVE_FILE, old_file)
            else:
                storage.remove(ACTIVE_FILE)
        raise


def _check_bundle(bundle: str | Path, check: Callable[[LoadedModel], Any] | None) -> str:
    """Load a bundle and return its version."""
    model = load_model(bundle, attacks=check is not None)
    if check is not None:
        try:
            check(model)
        except Exception as error:  # damaged attacks can raise anything
            raise BundleError(f"the attacks of bundle {str(bundle)!r} do not load: {_reason(error)}") from error
    return model.version
