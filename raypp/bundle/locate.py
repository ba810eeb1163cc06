"""From what training leaves behind to its bundle: every command and service that reads a bundle takes each of these.

A bundle, or its public or private part, is itself. A model repository is a folder with bundles under ``versions/``; its
file ``live.json`` names the active one. A run and a search hold bundles. Paths that Ray Train and Ray Tune return lie
inside a run or a search.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from raypp.bundle.manifest import MANIFEST
from raypp.utils.errors import BundleError, StorageError
from raypp.utils.paths import resolve_path
from raypp.utils.storage import Storage

ACTIVE_FILE = "live.json"
VERSIONS = "versions"
BUNDLE, BEST = "bundle", "best"
KNEE = "knee"  # the bundle of a search by default
RUN_FILE, SEARCH_FILE, SEARCH_SUMMARY = "config.yaml", "search.yaml", "search.json"
CHECKPOINTS, CHECKPOINT_FILE = "checkpoints", "checkpoint.json"  # Ray Train's folder in a run, and a checkpoint in it
TUNER_FILE, TRIAL_FILES = "tuner.pkl", {"params.json", "result.json"}  # of Ray Tune's experiment, and of a trial
ALLOWED = "a bundle, a model repository, a run, a search, or a result path or checkpoint of Ray Train or Ray Tune"


@dataclass(frozen=True)
class ActiveVersion:
    """The content of ``live.json``; versions are folders under ``versions/``."""

    version: str
    previous: str | None
    published: str | None


def locate_bundle(location: str | Path) -> str:
    """Find the bundle of a location; links stay as they are, so ``runs/latest`` is followed again at each call.

    Args:
        location: path or URI of one of :data:`ALLOWED`. ``SEARCH#knee``, ``SEARCH#accuracy`` and ``SEARCH#privacy``
            select a search's bundle, by default the knee.

    Raises:
        BundleError: there is no bundle, or none yet.
        StorageError: the location cannot be read, or a repository is damaged.
    """
    place, choice = split_choice(location)
    storage = Storage(place)
    if storage.local and storage.path.is_file():
        raise BundleError(f"{place!r} is a file; allowed is the folder of {ALLOWED}")
    names = set(storage.names())
    if not names and not storage.exists():
        raise BundleError(f"bundle {place!r} does not exist")
    if SEARCH_FILE in names:
        return _bundle_of_search(place, names, choice)
    if TUNER_FILE in names:
        return locate_bundle(_parent(place) + (f"#{choice}" if choice else ""))
    if choice:
        raise BundleError(f"{place!r} is no search, so #{choice} selects nothing; leave it out")
    if ACTIVE_FILE in names:
        return _join(place, VERSIONS, read_active(storage).version)
    if MANIFEST in names:
        return place
    if RUN_FILE in names or BUNDLE in names:
        return _bundle_of_run(place, names)
    if TRIAL_FILES & names:
        return _bundle_of_trial(place, names)
    return _bundle_of_checkpoint(place, names)


def split_choice(location: str | Path) -> tuple[str, str | None]:
    """Split ``SEARCH#knee`` into the location and the choice; a local folder may have a # in its name."""
    place, mark, choice = str(location).rpartition("#")
    if not mark or ("://" not in place and Path(location).expanduser().exists()):
        return str(location), None
    return place, choice or None


def read_active(storage: Storage) -> ActiveVersion:
    """Read a repository's ``live.json``; raises StorageError if it is damaged."""
    data = storage.read(ACTIVE_FILE)
    try:
        active = json.loads(data)
        return ActiveVersion(str(active["version"]), active.get("previous"), active.get("published"))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise StorageError(f"{storage.uri}/{ACTIVE_FILE} is damaged; publish a bundle there again") from None


def _bundle_of_run(place: str, names: set[str]) -> str:
    if BUNDLE in names and Storage(place).exists(f"{BUNDLE}/{MANIFEST}"):
        return _join(place, BUNDLE)
    raise BundleError(f"{place!r} is a run that has no bundle yet; `raypp train --resume` finishes it")


def _bundle_of_search(place: str, names: set[str], choice: str | None) -> str:
    if SEARCH_SUMMARY not in names:
        raise BundleError(f"{place!r} is a search that has not ended; `raypp tune --resume` finishes it")
    best = Storage(place).folder(BEST).folders()
    if choice is None and best:
        choice = KNEE if KNEE in best else best[0]  # a search for one objective has one best bundle
    if choice not in best:
        allowed = ", ".join(f"#{name}" for name in best) or "none, as the search has no best bundle"
        raise BundleError(f"{place!r} is a search without a bundle #{choice or KNEE}; allowed: {allowed}")
    return _join(place, BEST, choice)


def _bundle_of_trial(place: str, names: set[str]) -> str:
    """The newest checkpoint of Ray Tune's trial that is a bundle; the last one of a finished trial is."""
    storage = Storage(place)
    for name in sorted((name for name in names if name.startswith("checkpoint_")), reverse=True):
        if storage.exists(f"{name}/{MANIFEST}"):
            return _join(place, name)
    raise BundleError(f"{place!r} is a trial of Ray Tune that reported no bundle; name a finished trial or the search")


def _bundle_of_checkpoint(place: str, names: set[str]) -> str:
    """The bundle of the run in whose folder Ray Train stored its result, ``RUN/checkpoints``, or a checkpoint."""
    is_checkpoint = CHECKPOINT_FILE in names
    folder = Storage(_parent(place) if is_checkpoint else place)
    run = folder.parent
    if folder.name == CHECKPOINTS and run.exists(RUN_FILE):
        return _bundle_of_run(run.uri, set(run.names()))
    if is_checkpoint:
        raise BundleError(f"{place!r} is a checkpoint of training, which holds no bundle; name its run or its search")
    raise BundleError(f"{place!r} holds no bundle; allowed is {ALLOWED}")


def _join(place: str, *names: str) -> str:
    """A folder inside; relative paths stay relative, as the user wrote them."""
    if "://" not in place:
        return "/".join((place.rstrip("/"), *names))
    return Storage(place).folder("/".join(names)).uri


def _parent(place: str) -> str:
    return Storage(resolve_path(place)).parent.uri
