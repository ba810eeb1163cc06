"""Images at the edges: uint8 H x W x C arrays from bytes and back, and the step to float tensors.

Everything that enters raypp, from a file, a data set or an HTTP request, passes through :func:`decode`, so that one
place decides what an image is and refuses, by name, what is not.
"""

from __future__ import annotations

import io
import re
import unicodedata
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFile, ImageFont, ImageOps, UnidentifiedImageError

from raypp.utils.errors import DataError, StorageError
from raypp.utils.image_formats import (
    START_BYTES,
    DamagedError,
    Essence,
    check_png,
    check_tiff,
    essence,
    exif_orientation,
    is_unread,
    kind_of,
)

if TYPE_CHECKING:
    import torch

Pixels = npt.NDArray[np.uint8]
"""uint8 array, values 0 to 255, channels last."""

# A closed list: Pillow also knows formats that start other programs (EPS) or that nobody sends.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
SUFFIXES = frozenset(
    ".png .apng .jpg .jpeg .jpe .jfif .webp .bmp .dib .gif .tif .tiff .ppm .pgm .pbm .pnm".split()  # noqa: SIM905
)

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes each EXIF orientation."""

JOINERS = "\u200c\u200d"
UNREAD = frozenset(
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


def decode(
    data: bytes,
    *,
    name: str,
    size: tuple[int, int] | None = None,
    channels: int = 3,
    max_pixels: int = 64_000_000,
) -> Pixels:
    """Decode the bytes of one image file into the picture that a viewer would show.

    The EXIF orientation is applied, transparency is laid on white, 16-bit grey (and float grey in 0..1) is scaled to
    8 bits, CMYK becomes RGB. Of an animation the first frame is taken. Metadata that the picture does not need is not
    read.

    Args:
        data: the file's bytes.
        name: how a message should call the image (path, row, upload).
        size: (H, W) to fit the image to, see :func:`fit`; None keeps it as it is.
        channels: 3 for RGB, 1 for grey.
        max_pixels: refuse what the header says is larger, before any pixel is decoded.

    Returns:
        uint8 array (H, W, channels).

    Raises:
        DataError: not an image, damaged (see :mod:`raypp.utils.image_formats`), truncated, empty or too large.
    """
    kind = kind_of(data[:64])
    if not data:
        raise DataError(f"{name} is empty")
    if kind is None:
        raise DataError(f"{name} is not an image in one of the formats {', '.join(FORMATS)}")
    try:
        essential = essence(data, kind)
        image = _open(essential.data, kind)
        if image.width * image.height > max_pixels:
            raise DataError(
                f"{name} is {image.height} x {image.width} pixels, more than the {max_pixels} pixels allowed"
            )
        if kind == "TIFF":
            check_tiff(data, image.tag_v2)  # type: ignore[attr-defined]
        elif kind == "PNG":
            check_png(essential)
        image.load()
        flat = _upright(_flatten(image, name, essential), _orientation(image, kind, essential))
        pixels = np.array(flat.convert("L" if channels == 1 else "RGB"))
    except DataError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{name} has more than the {max_pixels} pixels allowed") from error
    except DamagedError as error:
        raise DataError(f"{name} is a damaged {kind} image: {error}") from error
    except UnidentifiedImageError as error:
        raise DataError(f"{name} is a damaged {kind} image: its header cannot be read") from error
    except Exception as error:  # on damaged bytes Pillow's decoders raise a dozen types, KeyError among them
        reason = " ".join(str(error).split()) or "its data cannot be decoded"
        raise DataError(f"{name} is a damaged {kind} image: {reason}") from error
    pixels = pixels.reshape(*pixels.shape[:2], channels)
    return pixels if size is None else fit(pixels, size)


def _open(data: bytes, kind: str) -> ImageFile.ImageFile:
    image = Image.open(io.BytesIO(data), formats=(kind,))
    image.decodermaxblock = max(image.decodermaxblock, len(data))  # else Pillow may stop before a PNG's last checksum
    return image


def _flatten(image: Image.Image, name: str, essential: Essence) -> Image.Image:
    """Return the opaque 8-bit form of a loaded image; refuse deep grey whose range is not 0..65535 or 0..1."""
    if image.mode.startswith("I") or image.mode == "F":
        values, top = np.asarray(image), 1 if image.mode == "F" else 65535
        if not (values.min() >= 0 and values.max() <= top):  # also refuses NaN
            raise DataError(f"{name} has grey values from {values.min()} to {values.max()}, allowed is 0 to {top}")
        flat = np.rint(values * (255 / top)).astype(np.uint8)
        if essential.key is not None:
            flat[values == essential.key[0]] = 255
        return Image.fromarray(flat)
    if essential.key is not None:
        return _white_where(image, essential)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA"))
    return image


def _white_where(image: Image.Image, essential: Essence) -> Image.Image:
    """Lay a grey PNG of 1 to 8 bits or an RGB PNG on white where it has the color that is declared transparent."""
    assert essential.key is not None
    flat = np.array(image.convert("L" if len(essential.key) == 1 else "RGB"))
    values = flat.astype(np.int64).reshape(*flat.shape[:2], -1)
    if essential.bits == 16:  # Pillow keeps the upper eight bits; taken for the other byte order, the lower ones
        lower = _open(essential.data, "PNG")
        lower.tile = [tile._replace(args="RGB;16L") for tile in lower.tile]
        values = 256 * values + np.asarray(lower)
    key = np.array(essential.key)
    if essential.bits < 8:
        key = key * 255 // (2**essential.bits - 1)
    flat[(values == key).all(2)] = 255
    return Image.fromarray(flat)


def _orientation(image: Image.Image, kind: str, essential: Essence) -> int:
    """The EXIF orientation; that of TIFF is applied by Pillow as it loads the image."""
    if kind == "WEBP":
        return exif_orientation(image.info.get("exif") or b"") or 1
    return essential.orientation


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    turn = TURNS.get(orientation)
    return image if turn is None else image.transpose(turn)


def fit(image: Pixels, size: tuple[int, int]) -> Pixels:
    """Resize so that the shorter side fits and crop the centre; returns the same array if it fits already.

    Args:
        image: uint8 (H, W, C), C is 1 or 3.
        size: the wanted (H, W).

    Returns:
        uint8 array (*size, C), aspect ratio preserved, antialiased.
    """
    if image.shape[:2] == size:
        return image
    height, width = size
    fitted = np.array(ImageOps.fit(_to_pil(image), (width, height), Image.Resampling.BILINEAR))
    return fitted.reshape(height, width, image.shape[2])


def grey(images: Pixels) -> Pixels:
    """Return (..., 1) luma of RGB (..., 3), the same integers as ``decode(channels=1)``."""
    red, green, blue = (images[..., i].astype(np.uint32) for i in range(3))
    luma = (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16
    return luma.astype(np.uint8)[..., None]


def encode_png(image: Pixels) -> bytes:
    """Return uint8 (H, W, 1 or 3) as the bytes of a PNG file; lossless."""
    buffer = io.BytesIO()
    _to_pil(image).save(buffer, "PNG")
    return buffer.getvalue()


def through_jpeg(images: Pixels, quality: int) -> Pixels:
    """What is left of uint8 (N, H, W, 1 or 3) after a JPEG of this quality (1 to 100), encoded as Pillow does."""
    found = []
    for image in images:
        buffer = io.BytesIO()
        _to_pil(image).save(buffer, "JPEG", quality=quality)
        found.append(np.asarray(Image.open(buffer)).reshape(image.shape))
    return np.stack(found)


def write_png(path: Path, image: Pixels) -> None:
    """Write a PNG file that appears whole or not at all; raises StorageError if ``path`` cannot be written."""
    aside = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        try:
            aside.write_bytes(encode_png(image))
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}") from error


def _to_pil(image: Pixels) -> Image.Image:
    return Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Return float (N, C, H, W) as uint8 of the same shape: clamped to [0, 1], rounded to the nearest of 256 levels."""
    import torch

    return images.clamp(0, 1).mul(255).round().to(torch.uint8)


def round_8bit(images: torch.Tensor) -> torch.Tensor:
    """Return what is left of float images after an 8-bit upload: the multiples of 1/255 nearest to them."""
    return to_uint8(images).to(images.dtype).div(255)


def grid(rows: list[Pixels], *, labels: list[str] | None = None, scale: int = 4) -> Pixels:
    """Lay rows of images out as one picture, each row's label at its left.

    Args:
        rows: uint8 arrays (N, H, W, 3) or (N, H, W, 1); N may differ between rows.
        labels: one per row, or None for none.
        scale: each pixel becomes a square of this side.

    Returns:
        uint8 array (H', W', 3).
    """
    gap, font = 4, ImageFont.load_default(size=16)
    names = labels or [""] * len(rows)
    left = max(int(font.getlength(name)) for name in names) + 2 * gap if labels else gap
    height = sum(row.shape[1] * scale + gap for row in rows) + gap
    width = max(len(row) * (row.shape[2] * scale + gap) for row in rows) + left
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    top = gap
    for row, name in zip(rows, names, strict=True):
        row_height, row_width = row.shape[1] * scale, row.shape[2] * scale
        draw.text((left - gap, top + row_height // 2), name, fill="black", font=font, anchor="rm")
        for column, image in enumerate(row):
            tile = _to_pil(image).resize((row_width, row_height), Image.Resampling.NEAREST)
            canvas.paste(tile, (left + column * (row_width + gap), top))
        top += row_height + gap
    return np.array(canvas)


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
    for file in walk(path):
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


def holds(folder: Path, entry: Path) -> bool:
    """Whether ``entry``, as its path says, lies in ``folder`` or is it, wherever links lead."""
    return entry.parent.resolve().is_relative_to(folder.resolve())


def printable(path: str | Path) -> str:
    """The path as text that any terminal and file takes.

    Bytes that are no UTF-8, control characters and those that turn the direction of writing are escaped. Spaces of
    every kind stay, and so do the joiners that Persian, Hindi and emoji need.
    """
    text = str(path).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(
        c if c.isprintable() or unicodedata.category(c) == "Zs" or c in JOINERS else c.encode("unicode_escape").decode()
        for c in text
    )


def walk(folder: Path, above: frozenset[Path] = frozenset()) -> Iterator[Path]:
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
            if not (entry.is_symlink() and (holds(entry, entry) or entry.resolve() in above)):
                yield from walk(entry, above)
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
    if suffixes & UNREAD:
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
