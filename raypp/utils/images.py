"""Convert images between encoded bytes, uint8 H x W x C arrays and float tensors.

Every image from a file, a data set or an HTTP request passes through :func:`decode`, which names what it refuses.
"""

from __future__ import annotations

import io
import re
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFile, ImageFont, ImageOps, UnidentifiedImageError

from raypp.utils.errors import DataError, StorageError
from raypp.utils.image_png import PNG_SIGNATURE, check_png, read_png
from raypp.utils.image_structure import DamagedError, PictureData, check_gif, check_tiff, exif_orientation, read_jpeg
from raypp.utils.storage import write_file

if TYPE_CHECKING:
    import torch

Pixels = npt.NDArray[np.uint8]
"""uint8 array, values 0 to 255, channels last."""

# Pillow also knows formats that start other programs (EPS) or that nobody sends.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
SUFFIXES = frozenset(
    ".png .apng .jpg .jpeg .jpe .jfif .webp .bmp .dib .gif .tif .tiff .ppm .pgm .pbm .pnm".split()  # noqa: SIM905
)
PPM = re.compile(rb"P[1-6]\s+(?:#[^\n]*\n\s*)*\d+\s")

EXIF_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The operation that undoes each EXIF orientation."""

JOINERS = "\u200c\u200d"


def decode(
    data: bytes, *, name: str, size: tuple[int, int] | None = None, channels: int = 3, max_pixels: int = 64_000_000
) -> Pixels:
    """Decode the bytes of one image file into the picture that a viewer would show, uint8 (H, W, channels).

    Decoding applies the EXIF orientation, lays transparency on white, scales 16-bit grey and float grey in 0..1 to
    8 bits, and converts CMYK to RGB. It takes the first frame of an animation and ignores all other metadata.

    Args:
        name: the image's name in messages (path, row, upload).
        size: (H, W) to resize to, see :func:`resize_and_center_crop`; None keeps the size.
        channels: 3 for RGB, 1 for grey.
        max_pixels: largest image allowed; checked in the header before any pixel is decoded.

    Raises:
        DataError: not an image, damaged (see :mod:`raypp.utils.image_structure`), truncated, empty or too large.
    """
    if not data:
        raise DataError(f"{name} is empty")
    kind = detect_format(data[:64])
    if kind is None:
        raise DataError(f"{name} is not an image in one of the formats {', '.join(FORMATS)}")
    try:
        pixels = _decode_pixels(data, kind, name, channels, max_pixels)
    except DataError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{name} has more than the {max_pixels} pixels allowed") from error
    except Exception as error:  # Pillow's decoders raise a dozen types for damaged bytes, such as KeyError
        reason = " ".join(str(error).split()) or "its data cannot be decoded"
        if isinstance(error, UnidentifiedImageError):
            reason = "its header cannot be read"
        raise DataError(f"{name} is a damaged {kind} image: {reason}") from error
    return pixels if size is None else resize_and_center_crop(pixels, size)


def detect_format(data: bytes) -> str | None:
    """Return Pillow's name of the format that the first bytes (32 suffice) declare; None for any other format."""
    if data.startswith(PNG_SIGNATURE):
        return "PNG"
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "TIFF"
    if data.startswith(b"BM") and data[6:10] == bytes(4) and data[15:18] == bytes(3):
        return "BMP"
    return "PPM" if PPM.match(data) else None


def _decode_pixels(data: bytes, kind: str, name: str, channels: int, max_pixels: int) -> Pixels:
    picture = _check_structure(data, kind)
    image = _open(picture.data, kind)
    if image.width * image.height > max_pixels:
        raise DataError(f"{name} is {image.height} x {image.width} pixels, more than the {max_pixels} pixels allowed")
    if kind == "TIFF":
        check_tiff(data, image.tag_v2)  # type: ignore[attr-defined]
    elif kind == "PNG":
        check_png(picture)
    image.load()
    flat = _flatten(image, name, picture)
    # Pillow applies the orientation of TIFF itself.
    orientation = exif_orientation(image.info.get("exif") or b"") if kind == "WEBP" else picture.orientation
    if orientation in EXIF_TRANSPOSITIONS:
        flat = flat.transpose(EXIF_TRANSPOSITIONS[orientation])
    pixels = np.array(flat.convert("L" if channels == 1 else "RGB"))
    return pixels.reshape(*pixels.shape[:2], channels)


def _check_structure(data: bytes, kind: str) -> PictureData:
    if kind == "PNG":
        return read_png(data)
    if kind == "JPEG":
        return read_jpeg(data)
    if kind == "GIF":
        check_gif(data)
    if kind == "WEBP" and len(data) < 8 + int.from_bytes(data[4:8], "little"):
        raise DamagedError("it is shorter than its header says")
    return PictureData(data)


def _open(data: bytes, kind: str) -> ImageFile.ImageFile:
    image = Image.open(io.BytesIO(data), formats=(kind,))
    image.decodermaxblock = max(image.decodermaxblock, len(data))  # Pillow may stop before a PNG's last checksum
    return image


def _flatten(image: Image.Image, name: str, picture: PictureData) -> Image.Image:
    """Return a loaded image as opaque 8 bits; raises DataError for deep grey outside 0..65535 or float outside 0..1."""
    if image.mode.startswith("I") or image.mode == "F":
        values, maximum = np.asarray(image), 1 if image.mode == "F" else 65535
        if not (values.min() >= 0 and values.max() <= maximum):  # also refuses NaN
            raise DataError(f"{name} has grey values from {values.min()} to {values.max()}, allowed is 0 to {maximum}")
        flat = np.rint(values * (255 / maximum)).astype(np.uint8)
        if picture.transparent is not None:
            flat[values == picture.transparent[0]] = 255
        return Image.fromarray(flat)
    if picture.transparent is not None:
        return _whiten(image, picture, picture.transparent)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA"))
    return image


def _whiten(image: Image.Image, picture: PictureData, transparent: tuple[int, ...]) -> Image.Image:
    """Make the transparent color of a PNG white; the PNG is RGB, or grey of 1 to 8 bits."""
    flat = np.array(image.convert("L" if len(transparent) == 1 else "RGB"))
    values = flat.astype(np.int64).reshape(*flat.shape[:2], -1)
    if picture.bit_depth == 16:  # Pillow keeps the upper eight bits; read in the other byte order, the lower ones
        lower = _open(picture.data, "PNG")
        lower.tile = [tile._replace(args="RGB;16L") for tile in lower.tile]
        values = 256 * values + np.asarray(lower)
    color = np.array(transparent)
    if picture.bit_depth < 8:
        color = color * 255 // (2**picture.bit_depth - 1)
    flat[(values == color).all(2)] = 255
    return Image.fromarray(flat)


def resize_and_center_crop(image: Pixels, size: tuple[int, int]) -> Pixels:
    """Resize uint8 (H, W, 1 or 3) so that the shorter side fits ``size`` (H, W), and crop the center.

    The aspect ratio is preserved and the result antialiased; an image of this size is returned unchanged.
    """
    if image.shape[:2] == size:
        return image
    height, width = size
    fitted = np.array(ImageOps.fit(_to_pil(image), (width, height), Image.Resampling.BILINEAR))
    return fitted.reshape(height, width, image.shape[2])


def to_grayscale(images: Pixels) -> Pixels:
    """Return (..., 1) luma of RGB (..., 3), the same integers as ``decode(channels=1)``."""
    red, green, blue = (images[..., i].astype(np.uint32) for i in range(3))
    luma = (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16
    return luma.astype(np.uint8)[..., None]


def encode_png(image: Pixels) -> bytes:
    """Return uint8 (H, W, 1 or 3) as the bytes of a PNG file; lossless."""
    return _encode(image, "PNG").getvalue()


def jpeg_roundtrip(images: Pixels, quality: int) -> Pixels:
    """Encode uint8 (N, H, W, 1 or 3) with Pillow as JPEG of this quality (1 to 100), and decode them again."""
    files = (_encode(image, "JPEG", quality=quality) for image in images)
    return np.stack([np.asarray(Image.open(file)) for file in files]).reshape(images.shape)


def _encode(image: Pixels, kind: str, **options: int) -> io.BytesIO:
    buffer = io.BytesIO()
    _to_pil(image).save(buffer, kind, **options)
    return buffer


def write_png(path: Path, image: Pixels) -> None:
    """Write a PNG file atomically; raises StorageError if ``path`` cannot be written."""
    try:
        write_file(path, encode_png(image))
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}") from error


def _to_pil(image: Pixels) -> Image.Image:
    return Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Return float (N, C, H, W) as uint8 of the same shape: clamped to [0, 1], rounded to the nearest of 256 levels."""
    return images.clamp(0, 1).mul(255).round().byte()


def as_pixels(images: Any, name: str) -> Pixels:
    """Convert images, NumPy or torch, to contiguous uint8 (N, H, W, C); raises DataError that names the argument."""
    import torch

    array = images.cpu().numpy() if isinstance(images, torch.Tensor) else np.asarray(images)
    if array.ndim == 3:
        array = array[None]
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] not in (1, 3) or not array.size:
        value = "missing" if images is None else f"{array.dtype} {array.shape}"
        raise DataError(f"{name} is {value}; allowed is uint8 (N, H, W, C) with 1 or 3 channels")
    return np.ascontiguousarray(array)


def channels_first(images: Pixels) -> torch.Tensor:
    """NumPy uint8 (N, H, W, C) as a contiguous tensor (N, C, H, W)."""
    import torch

    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def quantize_8bit(images: torch.Tensor) -> torch.Tensor:
    """Round float images to the nearest multiples of 1/255 in [0, 1], as an 8-bit upload does."""
    return to_uint8(images).to(images.dtype).div(255)


def make_grid(rows: list[Pixels], *, labels: list[str], scale: int = 4) -> Pixels:
    """Arrange rows of images in one picture uint8 (H', W', 3), with each row's label on its left.

    Args:
        rows: uint8 arrays (N, H, W, 3) or (N, H, W, 1); N may differ between rows.
        scale: side of the square that shows one pixel.
    """
    gap, font = 4, ImageFont.load_default(size=16)
    left = max(int(font.getlength(label)) for label in labels) + 2 * gap
    height = sum(row.shape[1] * scale + gap for row in rows) + gap
    width = max(len(row) * (row.shape[2] * scale + gap) for row in rows) + left
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    top = gap
    for row, label in zip(rows, labels, strict=True):
        row_height, row_width = row.shape[1] * scale, row.shape[2] * scale
        draw.text((left - gap, top + row_height // 2), label, fill="black", font=font, anchor="rm")
        for column, image in enumerate(row):
            tile = _to_pil(image).resize((row_width, row_height), Image.Resampling.NEAREST)
            canvas.paste(tile, (left + column * (row_width + gap), top))
        top += row_height + gap
    return np.array(canvas)


def printable(path: str | Path) -> str:
    """Escape what a terminal or text file cannot show in a path.

    These are bytes that are not UTF-8, control characters and characters that change the direction of writing. All
    kinds of spaces stay, and so do the joiners that Persian, Hindi and emoji need.
    """
    text = str(path).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(
        c if c.isprintable() or unicodedata.category(c) == "Zs" or c in JOINERS else c.encode("unicode_escape").decode()
        for c in text
    )
