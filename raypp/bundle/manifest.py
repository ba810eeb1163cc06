"""Manifests of bundles: clients get ``public/``; the classifier's owner keeps ``private/``.

Each part has a manifest with the SHA-256 of every file in it. ``public/`` alone is enough to protect images.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import raypp
from raypp.utils.documents import dump_json
from raypp.utils.errors import BundleError, StorageError
from raypp.utils.storage import Storage, sha256

SCHEMA = 1
MANIFEST = "manifest.json"
PUBLIC = ("protection.json", "protection.safetensors")
PRIVATE = ("classifier.json", "classifier.safetensors", "sample.safetensors", "metrics.json", "config.yaml")
"""Files that every public and every private part has."""


def write_manifest(folder: Path) -> None:
    """Write ``manifest.json``, which lists every other file below ``folder``."""
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
    (folder / MANIFEST).write_bytes(dump_json(manifest))


def verify(folder: Path, *required: str) -> dict[str, Any]:
    """Check every file that ``folder/manifest.json`` lists and return the manifest.

    BundleError is raised if the manifest is missing, unreadable, newer or lacks a ``required`` file, or if a file is
    missing, altered or unlisted.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        schema, files = int(manifest["schema"]), dict(manifest["files"])
        checksums = {str(name): str(entry["sha256"]) for name, entry in files.items()}
    except FileNotFoundError:
        raise BundleError(f"{str(folder)!r} is no bundle: {MANIFEST} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise BundleError(f"{str(folder / MANIFEST)!r} cannot be read: {error!r}") from error
    if schema > SCHEMA:
        raise BundleError(
            f"{str(folder)!r} has bundle schema {schema}, raypp {raypp.__version__} reads up to {SCHEMA}; upgrade raypp"
        )
    for name, checksum in checksums.items():
        _check_file(folder, name, checksum)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != MANIFEST and name not in checksums:
            raise BundleError(f"{str(folder)!r} was altered: {name} is not listed in its manifest")
    for name in required:
        if name not in checksums:
            raise BundleError(f"{str(folder)!r} is incomplete: its manifest does not list {name}")
    return dict(manifest)


def _check_file(folder: Path, name: str, checksum: str) -> None:
    path = folder / name
    try:
        is_inside = path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError):  # a name too long, a link to itself, a zero byte
        is_inside = False
    if not is_inside:
        raise BundleError(f"{str(folder)!r} lists {name!r}, a file outside of it")
    if not path.is_file():
        raise BundleError(f"{str(folder)!r} is incomplete: {name} is missing")
    if sha256(path) != checksum:
        raise BundleError(f"{str(folder)!r} was altered: {name} does not match its SHA-256")


@contextmanager
def local_folder(location: str | Path, part: str) -> Iterator[tuple[Path, bool]]:
    """Yield the local folder of one part of a bundle, and whether ``location`` is the whole bundle.

    A whole bundle is verified first, which detects parts of two different bundles.
    """
    try:
        storage = Storage(location)
        if not storage.exists():
            raise BundleError(f"bundle {str(location)!r} does not exist")
        is_whole = storage.exists(f"{part}/{MANIFEST}")
        with storage.download("") as folder:
            if is_whole:
                verify(folder)
            yield (folder / part if is_whole else folder), is_whole
    except StorageError as error:
        raise BundleError(f"bundle {str(location)!r} cannot be read: {error}") from error


def read_json_file(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BundleError(f"{str(path)!r} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise BundleError(f"{str(path)!r} holds no JSON object")
    return data
