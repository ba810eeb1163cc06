"""The exported artefact: ``public/`` is what clients may have, ``private/`` stays with the classifier's owner.

Both parts carry a manifest with the SHA-256 of every file in them; ``public/`` alone is enough to protect images.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import raypp
from raypp.utils.errors import BundleError, StorageError
from raypp.utils.storage import Storage, sha256

SCHEMA = 1
MANIFEST = "manifest.json"
LEAKAGE = "## What attacks recovered"
PRIVATE = ("classifier.json", "classifier.safetensors", "sample.safetensors", "metrics.json", "config.yaml")
"""Files that every private part has."""


def write_manifest(folder: Path) -> None:
    """Write ``manifest.json`` over every other file below ``folder``."""
    files = {
        path.relative_to(folder).as_posix(): {"sha256": sha256(path), "bytes": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / MANIFEST
    }
    manifest = {
        "schema": SCHEMA,
        "raypp": raypp.__version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "files": files,
    }
    (folder / MANIFEST).write_bytes(_json(manifest))


def verify(folder: Path) -> dict[str, Any]:
    """Check every file that ``folder/manifest.json`` lists and return the manifest.

    Raises:
        BundleError: no manifest, a newer schema, or a missing, altered or unlisted file, by name.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        schema, files = int(manifest["schema"]), dict(manifest["files"])
        sums = {str(name): str(entry["sha256"]) for name, entry in files.items()}
    except FileNotFoundError:
        raise BundleError(f"{str(folder)!r} is no bundle: {MANIFEST} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise BundleError(f"{str(folder / MANIFEST)!r} cannot be read: {error!r}") from error
    if schema > SCHEMA:
        raise BundleError(
            f"{str(folder)!r} has bundle schema {schema}, raypp {raypp.__version__} reads up to {SCHEMA}; upgrade raypp"
        )
    for name, expected in sums.items():
        path = folder / name
        try:
            inside = path.resolve().is_relative_to(folder.resolve())
        except (OSError, RuntimeError, ValueError):  # a name too long, a link to itself, a zero byte
            inside = False
        if not inside:
            raise BundleError(f"{str(folder)!r} lists {name!r}, a file outside of it")
        if not path.is_file():
            raise BundleError(f"{str(folder)!r} is incomplete: {name} is missing")
        if sha256(path) != expected:
            raise BundleError(f"{str(folder)!r} was altered: {name} does not match its SHA-256")
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != MANIFEST and name not in sums:
            raise BundleError(f"{str(folder)!r} was altered: {name} is not listed in its manifest")
    return dict(manifest)


@contextmanager
def local_folder(location: str | Path, part: str) -> Iterator[tuple[Path, bool]]:
    """Give the local folder of one part of a bundle, and whether the rest stands beside it.

    Of a whole bundle every file is verified first: so nobody can put the public part of one beside the private part of
    another.
    """
    try:
        storage = Storage(location)
        if not storage.exists():
            raise BundleError(f"bundle {str(location)!r} does not exist")
        whole = storage.exists(f"{part}/{MANIFEST}")
        with storage.download("") as folder:
            if whole:
                verify(folder)
            yield (folder / part if whole else folder), whole
    except StorageError as error:
        raise BundleError(f"bundle {str(location)!r} cannot be read: {error}") from error


def listed_files(manifest: dict[str, Any], folder: Path, *names: str) -> None:
    """Refuse a part whose manifest does not vouch for a file that will be read."""
    for name in names:
        if name not in manifest["files"]:
            raise BundleError(f"{str(folder)!r} is incomplete: its manifest does not list {name}")


def read_json_file(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BundleError(f"{str(path)!r} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise BundleError(f"{str(path)!r} holds no JSON object")
    return data


def _json(data: Any) -> bytes:
    return (json.dumps(data, indent=2) + "\n").encode()
