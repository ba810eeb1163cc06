"""Check the structure of image files other than PNG for damage, and drop the metadata that the picture does not need.

JPEG and GIF have an end marker. Compressed image data of TIFF may have a checksum. A fault in metadata is no fault of
the image. The EXIF orientation is the only metadata that is read.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

EXIF_PREFIX = b"Exif\0\0"
ORIENTATION_TAG, TIFF_LONG = 0x112, 4
XMP_ORIENTATION = re.compile(rb"tiff:Orientation(?:\s*=\s*[\"']|>)\s*([1-8])")
BLOCK_BYTES = 2**20  # decompressed at a time
TIFF_COMPRESSION, TIFF_DEFLATE = 259, (8, 32946)
TIFF_PARTS = ((273, 279), (324, 325))  # tags of offsets and lengths, of strips and of tiles

XMP_PREFIX = b"http://ns.adobe.com/xap/1.0/\0"
JFIF_SEGMENT = b"\xff\xe0\x00\x10JFIF\0\x01\x01\0\0\x01\0\x01\0\0"
TEM, RST0, RST7, SOI, EOI, SOS, DRI = 0x01, 0xD0, 0xD7, 0xD8, 0xD9, 0xDA, 0xDD
APP0, APP1, APP2, APP14, APP15, COM = 0xE0, 0xE1, 0xE2, 0xEE, 0xEF, 0xFE
ADOBE_BYTES = 12  # of Adobe's segment, whose last byte names the color transform
# A marker in a scan's data. FF 00 stands for a data byte FF, and FF may be repeated before a marker.
JPEG_MARKER = re.compile(rb"\xff+([^\x00\xff])")


class DamagedError(Exception):
    """The file's own integrity data shows damage; the message completes "a damaged ... image"."""


class PictureData(NamedTuple):
    """The parts of an image file that determine the picture.

    Attributes:
        data: the file without other metadata.
        orientation: EXIF orientation, 1 to 8.
        transparent: the transparent color of a PNG as in the file: one grey value or three of RGB.
        bit_depth: bits per sample of a PNG.
        packed: compressed image data of a PNG.
        num_bytes: least size of that data when decompressed.
    """

    data: bytes
    orientation: int = 1
    transparent: tuple[int, ...] | None = None
    bit_depth: int = 8
    packed: bytes = b""
    num_bytes: int = 0


def inflate(packed: bytes, max_bytes: int | None = None) -> tuple[int, bool]:
    """Decompress zlib data in bounded memory, up to ``max_bytes``; raises DamagedError for invalid data.

    Returns the decompressed size, and whether the stream reached its end and checksum.
    """
    inflator, num = zlib.decompressobj(), 0
    try:
        while not inflator.eof and (max_bytes is None or num < max_bytes):
            block = inflator.decompress(packed, BLOCK_BYTES if max_bytes is None else min(BLOCK_BYTES, max_bytes - num))
            packed, num = inflator.unconsumed_tail, num + len(block)
            if not block and not packed:
                break
    except zlib.error as error:
        raise DamagedError("its image data or their checksum is wrong") from error
    return num, inflator.eof


def exif_orientation(exif: bytes) -> int | None:
    """Read the orientation of an EXIF block with or without its prefix; None if there is none to read."""
    tiff = exif.removeprefix(EXIF_PREFIX)
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return None
    try:
        (start,) = struct.unpack_from(order + "I", tiff, 4)
        (num,) = struct.unpack_from(order + "H", tiff, start)
        for offset in range(start + 2, start + 2 + 12 * num, 12):
            tag, value_type = struct.unpack_from(order + "HH", tiff, offset)
            if tag == ORIENTATION_TAG:
                value = struct.unpack_from(order + ("I" if value_type == TIFF_LONG else "H"), tiff, offset + 8)[0]
                return value if 1 <= value <= 8 else None
    except struct.error:
        pass
    return None


def xmp_orientation(xmp: bytes) -> int | None:
    match = XMP_ORIENTATION.search(xmp)
    return int(match[1]) if match else None


def check_tiff(data: bytes, tags: Mapping[int, Any]) -> None:
    """Check the zlib checksums of a TIFF's first picture by its tags, if it uses zlib; raises DamagedError."""
    if tags.get(TIFF_COMPRESSION) not in TIFF_DEFLATE:
        return
    for offsets, lengths in TIFF_PARTS:
        for start, length in zip(_as_tuple(tags.get(offsets)), _as_tuple(tags.get(lengths)), strict=False):
            if not inflate(data[start : start + length])[1]:
                raise DamagedError("its image data ends early")


def _as_tuple(value: Any) -> tuple[int, ...]:
    return () if value is None else value if isinstance(value, tuple) else (value,)


def read_jpeg(data: bytes) -> PictureData:
    """Walk from marker to marker up to the end marker; bytes after it do not belong to the image."""
    segments, position, num_scans, restart_interval = [b"\xff\xd8"], 2, 0, 0
    exif = xmp = b""
    while True:
        match = JPEG_MARKER.search(data, position)
        if match is None:
            raise DamagedError("it has no end marker")
        marker, position = match[1][0], match.end()
        if marker == EOI:
            break
        if marker in (SOI, TEM) or RST0 <= marker <= RST7:
            continue
        end = position + int.from_bytes(data[position : position + 2], "big")
        if end < position + 2 or end > len(data):
            raise DamagedError("it ends within a segment")
        content = data[position + 2 : end]
        is_adobe = marker == APP14 and content.startswith(b"Adobe") and len(content) >= ADOBE_BYTES
        if marker == APP0:
            if content.startswith(b"JFIF\0"):
                segments.append(JFIF_SEGMENT)
        elif marker == APP1:
            exif = exif or (content if content.startswith(EXIF_PREFIX) else b"")
            xmp = xmp or (content if content.startswith(XMP_PREFIX) else b"")
        elif not (APP2 <= marker <= APP15 or marker == COM) or is_adobe:
            segments.append(b"\xff" + match[1] + data[position:end])
        position = end
        if marker == DRI and len(content) == 2:
            restart_interval = int.from_bytes(content, "big")
        if marker == SOS:
            num_scans += 1
            position = _end_of_scan(data, end, restart_interval)
            segments.append(data[end:position])
    if not num_scans:
        raise DamagedError("it has no image data")
    orientation = exif_orientation(exif) or xmp_orientation(xmp) or 1
    return PictureData(b"".join([*segments, b"\xff\xd9"]), orientation)


def _end_of_scan(data: bytes, start: int, restart_interval: int) -> int:
    """Position of the first marker after a scan's data; its restart markers must count from 0 to 7 repeatedly."""
    for index, match in enumerate(JPEG_MARKER.finditer(data, start)):
        marker = match[1][0]
        if not RST0 <= marker <= RST7:
            return match.start()
        if restart_interval and marker - RST0 != index % 8:
            raise DamagedError("a part of its image data is missing")
    raise DamagedError("it has no end marker")


def check_gif(data: bytes) -> None:
    """Walk from block to block up to the trailer."""
    position = 13 + _color_table_bytes(data[10:11])
    while True:
        block, position = data[position : position + 1], position + 1
        if block == b";":
            return
        if block == b"\0":  # some encoders pad blocks
            continue
        if block == b"!":
            position += 1
        elif block == b",":
            position += 10 + _color_table_bytes(data[position + 8 : position + 9])
        elif not block:
            raise DamagedError("it has no end marker")
        else:
            raise DamagedError("it has a block of an unknown kind")
        while data[position : position + 1] not in (b"", b"\0"):
            position += 1 + data[position]
        position += 1


def _color_table_bytes(flags: bytes) -> int:
    return 3 * 2 ** ((flags[0] & 7) + 1) if flags and flags[0] & 0x80 else 0
