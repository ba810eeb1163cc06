"""A bundle as the final checkpoint of a trial: other files are removed, and hard links replace the second copy."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from pyarrow import fs

from raypp.bundle.manifest import MANIFEST


def remove_unlisted_files(checkpoint: Any) -> None:
    """Remove files that the manifest of a bundle does not list; other checkpoints stay as they are.

    In a population, Tune gives a trial that continues from another one the number of a checkpoint that it has already.
    """
    files, root = checkpoint.filesystem, checkpoint.path.rstrip("/")
    paths = [entry.path for entry in files.get_file_info(fs.FileSelector(root, recursive=True)) if entry.is_file]
    names = {path.removeprefix(f"{root}/"): path for path in paths}
    if MANIFEST in names:
        with files.open_input_stream(names[MANIFEST]) as stream:
            listed = {MANIFEST, *json.loads(stream.read())["files"]}
        for name in names.keys() - listed:
            files.delete_file(names[name])


def share_files(folder: Path, copy: Path) -> None:
    """Replace the files of a copy by hard links to the originals, if the file system has them."""
    for path in (folder, *folder.rglob("*")):
        twin = copy / path.relative_to(folder)
        if path.is_dir() and twin.is_dir():
            shutil.copymode(path, twin)
        elif path.is_file() and twin.is_file() and not twin.samefile(path):
            link = _temporary_name(twin)
            with contextlib.suppress(OSError):  # the copy stays
                os.link(path, link)
                link.replace(twin)


def separate_files(folder: Path) -> None:
    """Undo :func:`share_files`, before Tune writes the copy once more: it would empty the originals."""
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_nlink > 1:
            original = _temporary_name(path)
            shutil.copy2(path, original)
            original.replace(path)


def _temporary_name(path: Path) -> Path:
    return path.with_name(f".{uuid.uuid4().hex}.tmp")
