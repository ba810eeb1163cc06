"""Find image files in folders."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from raypp.utils.errors import DataError
from raypp.utils.image_formats import START_BYTES, is_unread, kind_of
from raypp.utils.images import SUFFIXES, printable

UNSUPPORTED_SUFFIXES = frozenset(
    ".heic .heics .heif .hif .avif .avifs .jp2 .j2k .j2c .jpc .jpf .jpm .jpx .jph .jhc .jls .jxl .jxr .wdp .svg .svgz "  # noqa: SIM905
    ".eps .epsf .epsi .emf .wmf .dng .cr2 .cr3 .nef .arw .orf .rw2 .raf .pef .srw .x3f .erf .kdc .mrw .3fr .iiq "
    ".psd .psb .xcf .tga .exr .hdr .ico .cur .icns .pcx .dds .pam .pfm .phm .qoi .bpg .flif .mng .jng .xbm .xpm .wbmp "
    ".ras .sgi .pict .djvu .dcm .dicom .fits .fit .fts .npy .npz".split()
)
"""Suffixes of images that are not read here: passing them over in silence would lose data."""

IGNORED_FOLDERS = frozenset(
    {"__MACOSX", "@eaDir", "__pycache__", "lost+found", "$RECYCLE.BIN", "System Volume Information"}
)
"""Folders that systems and file managers add, with thumbnails and copies."""

# A download that was numbered (c.png.1), or that kept the query of its address (d.jpg?w=300).
DOWNLOADED = re.compile(r"(\.[a-z0-9]+)(?:\.\d+|[?&#;@].*|\s*\(\d+\))$")


def find_images(path: Path) -> list[Path]:
    """Return the image files below ``path``, sorted; a file gives itself.

    Links to files and folders are followed, except to a folder that holds the link. A file is an image by its suffix,
    or by its first bytes where the suffix says nothing. Where images have no suffix, an empty file without one is an
    image too, a damaged one. Hidden files and folders, and those of ``IGNORED_FOLDERS``, are passed over.

    Raises:
        DataError: ``path`` does not exist, no file below it is an image, one is of a format that is not read here, or
            one is a link that leads nowhere.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"{printable(path)} does not exist")
    files, empty = [], []
    for file in walk_files(path):
        if is_image(file):
            files.append(file)
        elif not file.suffix and file.is_file() and not file.stat().st_size:
            empty.append(file)
    bare = {file.parent for file in files if not file.suffix}
    files = sorted(files + [file for file in empty if file.parent in bare])
    if not files:
        raise DataError(f"{printable(path)} holds no image, that is no file ending in {', '.join(sorted(SUFFIXES))}")
    return files


def is_ignored(name: str) -> bool:
    """Whether a file or folder of this name is passed over: hidden, or a file manager's."""
    return name.startswith(".") or name in IGNORED_FOLDERS


def contains_images(folder: Path, entry: Path) -> bool:
    """Whether ``entry``, as its path says, lies in ``folder`` or is it, wherever links lead."""
    return entry.parent.resolve().is_relative_to(folder.resolve())


def walk_files(folder: Path, above: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """Yield every file below a folder that is not passed over; links are followed, except to a folder that holds them.

    ``above`` are the real paths of the folders that led here.
    """
    above |= {folder.resolve()}
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f"{printable(folder)} cannot be read: {error.strerror}") from error
    for entry in entries:
        if is_ignored(entry.name):
            continue
        if entry.is_dir():
            if not (entry.is_symlink() and (contains_images(entry, entry) or entry.resolve() in above)):
                yield from walk_files(entry, above)
        else:
            yield entry


def is_image(file: Path) -> bool:
    """Whether a file is an image; raises DataError where it is one that cannot be read."""
    suffix = file.suffix.lower()
    downloaded = DOWNLOADED.search(file.name.lower())
    suffixes = {suffix, downloaded[1]} if downloaded else {suffix}
    if not file.exists() and file.is_symlink():
        if suffixes & (SUFFIXES | {""}):
            raise DataError(f"{printable(file)} is a link to a file or folder that does not exist")
        return False
    if not file.is_file():  # a socket or a pipe
        return False
    if suffixes & UNSUPPORTED_SUFFIXES:
        raise _unread(file)
    if suffixes & SUFFIXES:
        return True
    try:
        with file.open("rb") as opened:
            start = opened.read(START_BYTES)
    except OSError as error:
        raise DataError(f"{printable(file)} cannot be read: {error.strerror}") from error
    if is_unread(start):
        raise _unread(file)
    return kind_of(start) is not None


def _unread(file: Path) -> DataError:
    return DataError(f"{printable(file)} is an image in a format that is not read here; convert it, or move it away")
