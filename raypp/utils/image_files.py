"""Find image files in folders."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from raypp.utils.errors import DataError
from raypp.utils.images import SUFFIXES, detect_format, printable

UNSUPPORTED_SUFFIXES = frozenset(
    ".heic .heics .heif .hif .avif .avifs .jp2 .j2k .j2c .jpc .jpf .jpm .jpx .jph .jhc .jls .jxl .jxr .wdp .svg .svgz "  # noqa: SIM905
    ".eps .epsf .epsi .emf .wmf .dng .cr2 .cr3 .nef .arw .orf .rw2 .raf .pef .srw .x3f .erf .kdc .mrw .3fr .iiq "
    ".psd .psb .xcf .tga .exr .hdr .ico .cur .icns .pcx .dds .pam .pfm .phm .qoi .bpg .flif .mng .jng .xbm .xpm .wbmp "
    ".ras .sgi .pict .djvu .dcm .dicom .fits .fit .fts .npy .npz".split()
)
"""Suffixes of images that raypp does not read; ignoring such files silently would lose data."""

# fmt: off
UNSUPPORTED_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"avif", b"avis", b"mif1", b"msf1", b"crx ")
UNSUPPORTED_STARTS = (
    b"\xff\x0a", b"\xff\x4f\xff\x51", b"II\xbc",  # JPEG XL and JPEG 2000 without a container, JPEG XR
    b"8BPS", b"\0\0\1\0", b"icns", b"gimp xcf", b"DDS ", b"\n\5\1\x08", b"BPG\xfb", b"FLIF", b"qoif",
    b"PF\n", b"Pf\n", b"PF\r\n", b"Pf\r\n", b"P7\n", b"\x8aMNG", b"\x8bJNG", b"/* XPM */", b"AT&TFORM",
    b"\x76\x2f\x31\x01", b"#?RADIANCE", b"#?RGBE", b"SIMPLE  =", b"\x93NUMPY",
    b"II*\0\x10\0\0\0CR", b"IIU\0", b"IIRO", b"IIRS", b"MMOR", b"FUJIFILM",  # raw files of cameras
)
# fmt: on
SVG = re.compile(rb"(?is)(?:\xef\xbb\xbf)?(?:\s|<\?[^>]*>|<!--(?:(?!-->).)*-->)*<(?:!DOCTYPE\s+svg|(?:svg:)?svg)[\s>]")
EPS = re.compile(rb"%!PS-Adobe-[\d.]+ EPSF|\xc5\xd0\xd3\xc6")
START_BYTES = 1024  # of a file, enough to detect its format

IGNORED_FOLDERS = frozenset(
    {"__MACOSX", "@eaDir", "__pycache__", "lost+found", "$RECYCLE.BIN", "System Volume Information"}
)
"""Folders that systems and file managers add, with thumbnails and copies."""

# A download with a number (c.png.1) or with the query of its address (d.jpg?w=300).
DOWNLOADED = re.compile(r"(\.[a-z0-9]+)(?:\.\d+|[?&#;@].*|\s*\(\d+\))$")


def find_images(path: Path) -> list[Path]:
    """Return the image files below ``path``, sorted; a file is returned as it is.

    Links are followed, except to a folder that contains the link. A file is an image by its suffix, or by its first
    bytes if the suffix is unknown. An empty file without a suffix counts as a damaged image if other images in its
    folder have no suffix. Hidden entries and ``IGNORED_FOLDERS`` are skipped.

    Raises:
        DataError: ``path`` does not exist, no file below it is an image, an image has an unsupported format, or a link
            is broken.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"{printable(path)} does not exist")
    images, empty_files = [], []
    for file in walk_files(path):
        if is_image(file):
            images.append(file)
        elif not file.suffix and file.is_file() and not file.stat().st_size:
            empty_files.append(file)
    folders_without_suffixes = {file.parent for file in images if not file.suffix}
    images += [file for file in empty_files if file.parent in folders_without_suffixes]
    if not images:
        raise DataError(f"{printable(path)} holds no image, that is no file ending in {', '.join(sorted(SUFFIXES))}")
    return sorted(images)


def is_ignored(name: str) -> bool:
    """Whether a file or folder of this name is hidden or belongs to a file manager."""
    return name.startswith(".") or name in IGNORED_FOLDERS


def links_to_ancestor(entry: Path) -> bool:
    """Whether an entry is a link to a folder that contains the link."""
    return entry.is_symlink() and entry.parent.resolve().is_relative_to(entry.resolve())


def walk_files(folder: Path, ancestors: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """Yield every file below a folder that is not ignored; links are followed, except to a folder that contains them.

    The real paths of the folders above it are ``ancestors``.
    """
    ancestors |= {folder.resolve()}
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f"{printable(folder)} cannot be read: {error.strerror}") from error
    for entry in entries:
        if is_ignored(entry.name):
            continue
        if not entry.is_dir():
            yield entry
        elif not (links_to_ancestor(entry) or (entry.is_symlink() and entry.resolve() in ancestors)):
            yield from walk_files(entry, ancestors)


def is_image(file: Path) -> bool:
    """Whether a file is an image; raises DataError if it is one that cannot be read."""
    downloaded = DOWNLOADED.search(file.name.lower())
    suffixes = {file.suffix.lower(), *(downloaded.groups() if downloaded else ())}
    if not file.exists() and file.is_symlink():
        if suffixes & (SUFFIXES | {""}):
            raise DataError(f"{printable(file)} is a link to a file or folder that does not exist")
        return False
    if not file.is_file():  # a socket or a pipe
        return False
    start = b"" if suffixes & (SUFFIXES | UNSUPPORTED_SUFFIXES) else _read_start(file)
    if suffixes & UNSUPPORTED_SUFFIXES or _is_unsupported(start):
        raise DataError(f"{printable(file)} is an image in a format that is not supported; convert it, or move it away")
    return bool(suffixes & SUFFIXES) or detect_format(start) is not None


def _read_start(file: Path) -> bytes:
    try:
        with file.open("rb") as stream:
            return stream.read(START_BYTES)
    except OSError as error:
        raise DataError(f"{printable(file)} cannot be read: {error.strerror}") from error


def _is_unsupported(start: bytes) -> bool:
    """Whether the first START_BYTES declare an image in a format that raypp does not read: HEIC, AVIF, JXL, SVG, ..."""
    return (
        start.startswith(UNSUPPORTED_STARTS)
        or (start[4:8] == b"ftyp" and start[8:12] in UNSUPPORTED_BRANDS)
        or start[4:8] in (b"jP  ", b"JXL ")
        or start[128:132] == b"DICM"
        or SVG.match(start) is not None
        or EPS.match(start) is not None
    )
