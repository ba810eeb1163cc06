"""Detect the format of an image file by its first bytes, and check its structure."""

from __future__ import annotations

import re

from raypp.utils.image_png import PNG_SIGNATURE, read_png
from raypp.utils.image_structure import DamagedError, PictureData, check_gif, read_jpeg

START_BYTES = 1024  # of a file, enough to detect its format
PPM = re.compile(rb"P[1-6]\s+(?:#[^\n]*\n\s*)*\d+\s")
SVG = re.compile(
    rb"(?:\xef\xbb\xbf)?(?:\s|<\?[^>]*>|<!--(?:(?!-->).)*-->)*<(?:!DOCTYPE\s+svg|(?:svg:)?svg)[\s>]",
    re.DOTALL | re.IGNORECASE,
)
EPS = re.compile(rb"%!PS-Adobe-[\d.]+ EPSF|\xc5\xd0\xd3\xc6")

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
    if data.startswith(b"BM") and data[6:10] == bytes(4) and len(data) >= 18 and data[15:18] == bytes(3):
        return "BMP"
    if PPM.match(data):
        return "PPM"
    return None


def is_unsupported(data: bytes) -> bool:
    """Whether the first START_BYTES declare an image in a format that raypp does not read: HEIC, AVIF, JXL, SVG, ..."""
    return (
        data.startswith(UNSUPPORTED_STARTS)
        or (data[4:8] == b"ftyp" and data[8:12] in UNSUPPORTED_BRANDS)
        or data[4:8] in (b"jP  ", b"JXL ")
        or data[128:132] == b"DICM"
        or SVG.match(data) is not None
        or EPS.match(data) is not None
    )


def read_picture(data: bytes, kind: str) -> PictureData:
    """Check a file of a format of :func:`detect_format`; raises DamagedError."""
    if kind == "PNG":
        return read_png(data)
    if kind == "JPEG":
        return read_jpeg(data)
    if kind == "GIF":
        check_gif(data)
    if kind == "WEBP" and len(data) < 8 + int.from_bytes(data[4:8], "little"):
        raise DamagedError("it is shorter than its header says")
    return PictureData(data)
