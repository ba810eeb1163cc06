"""Hard links between a trial's bundle and the copy that Tune makes of it as a checkpoint."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from pathlib import Path


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
