"""The structure of image files: what says that one is damaged, and what of it decides on the picture.

PNG has a checksum for each chunk and for the image data, JPEG and GIF have an end marker, WebP states its length,
and packed image data of TIFF may have a checksum. These are checked here. Metadata that the picture does not need is
left out, so that no fault in it is a fault of the image; the EXIF orientation is read by itself.
"""

from __future__ import annotations

import hashlib
import re
import struct
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_TRANSPARENCY = b"tRNS"
PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
GREY, RGB, PALETTE = 0, 2, 3  # PNG's numbers of color types
CHANNELS = {GREY: 1, RGB: 3, PALETTE: 1, 4: 2, 6: 4}
ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
"""First row and column, and steps between rows and between columns, of each pass of an interlaced PNG."""
# Pillow refuses image data that ends early, but not data that lacks only its checksum. Bytes that follow are then taken
# for the checksum, which is wrong; image data that is complete ends before them.
PNG_SENTINEL = hashlib.sha512(b"not image data").digest()
TEXT_BYTES = 2**16  # of a text that may hold an orientation

TIFF_COMPRESSION, TIFF_DEFLATE = 259, (8, 32946)
TIFF_PARTS = ((273, 279), (324, 325))  # tags of offsets and lengths, of strips and of tiles
BLOCK = 2**20  # bytes that are unpacked at a time
EXIF, XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
JFIF = b"\xff\xe0\x00\x10JFIF\0\x01\x01\0\0\x01\0\x01\0\0"
SOI, EOI, SOS, DRI, COM, ADOBE = 0xD8, 0xD9, 0xDA, 0xDD, 0xFE, 0xEE
ADOBE_BYTES = 12  # of Adobe's segment, whose last one names the color transform
# A marker within a scan's data; 00 stands for a byte FF of the data, and FF may be repeated before a marker.
JPEG_MARKER = re.compile(rb"\xff+([^\x00\xff])")
XMP_ORIENTATION = re.compile(rb"tiff:Orientation(?:\s*=\s*[\"']|>)\s*([1-8])")
PPM = re.compile(rb"P[1-6]\s+(?:#[^\n]*\n\s*)*\d+\s")
SVG = re.compile(
    rb"(?:\xef\xbb\xbf)?(?:\s|<\?[^>]*>|<!--(?:(?!-->).)*-->)*<(?:!DOCTYPE\s+svg|(?:svg:)?svg)[\s>]",
    re.DOTALL | re.IGNORECASE,
)
EPS = re.compile(rb"%!PS-Adobe-[\d.]+ EPSF|\xc5\xd0\xd3\xc6")
START_BYTES = 1024  # of a file, enough to detect its format

UNREAD_FAMILIES = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"avif", b"avis", b"mif1", b"msf1", b"crx ")
# fmt: off
UNREAD_STARTS = (
    b"\xff\x0a", b"\xff\x4f\xff\x51", b"II\xbc",  # JPEG XL and JPEG 2000 without a container, JPEG XR
    b"8BPS", b"\0\0\1\0", b"icns", b"gimp xcf", b"DDS ", b"\n\5\1\x08", b"BPG\xfb", b"FLIF", b"qoif",
    b"PF\n", b"Pf\n", b"PF\r\n", b"Pf\r\n", b"P7\n", b"\x8aMNG", b"\x8bJNG", b"/* XPM */", b"AT&TFORM",
    b"\x76\x2f\x31\x01", b"#?RADIANCE", b"#?RGBE", b"SIMPLE  =", b"\x93NUMPY",
    b"II*\0\x10\0\0\0CR", b"IIU\0", b"IIRO", b"IIRS", b"MMOR", b"FUJIFILM",  # of cameras
)
# fmt: on


class DamagedError(Exception):
    """The file's own integrity data says that it is damaged; the message completes "a damaged ... image"."""


class Essence(NamedTuple):
    """What of an image file decides on the picture.

    Attributes:
        data: the file, without other metadata.
        orientation: EXIF's, 1 to 8.
        key: the PNG color that is transparent: one number of grey or three of RGB, as they stand in the file.
        bits: of a PNG's samples.
        packed: a PNG's image data, compressed.
        num_bytes: what they must unpack to at least.
    """

    data: bytes
    orientation: int = 1
    key: tuple[int, ...] | None = None
    bits: int = 8
    packed: bytes = b""
    num_bytes: int = 0


def kind_of(data: bytes) -> str | None:
    """Return the Pillow name of the format that the first bytes (32 suffice) declare; None if no known one does."""
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


def is_unread(data: bytes) -> bool:
    """Whether the first START_BYTES declare an image in a format that is not read here: HEIC, AVIF, JXL, SVG, ..."""
    return (
        data.startswith(UNREAD_STARTS)
        or (data[4:8] == b"ftyp" and data[8:12] in UNREAD_FAMILIES)
        or data[4:8] in (b"jP  ", b"JXL ")
        or data[128:132] == b"DICM"
        or SVG.match(data) is not None
        or EPS.match(data) is not None
    )


def essence(data: bytes, kind: str) -> Essence:
    """Check a file of a ``kind`` that :func:`kind_of` gave; raises DamagedError."""
    if kind == "PNG":
        return _png(data)
    if kind == "JPEG":
        return _jpeg(data)
    if kind == "GIF":
        _check_gif(data)
    if kind == "WEBP" and len(data) < 8 + int.from_bytes(data[4:8], "little"):
        raise DamagedError("it is shorter than its header says")
    return Essence(data)


def check_png(essential: Essence) -> None:
    """Check that a PNG's image data unpack to all of its pixels; raises DamagedError.

    Pillow takes data that end soundly but early for black pixels.
    """
    inflator, packed, missing = zlib.decompressobj(), essential.packed, essential.num_bytes
    try:
        while missing > 0 and not inflator.eof:
            values = inflator.decompress(packed, min(missing, BLOCK))
            if not values and not inflator.unconsumed_tail:
                break
            packed, missing = inflator.unconsumed_tail, missing - len(values)
    except zlib.error as error:
        raise DamagedError("its image data or their checksum is wrong") from error
    if missing > 0:
        raise DamagedError("its image data ends early")


def _png_bytes(width: int, height: int, bits: int, interlaced: bool) -> int:
    """What a PNG's image data unpack to; ``bits`` are those of a pixel. Each row begins with its filter's number."""
    num = 0
    for top, left, down, right in ADAM7 if interlaced else ((0, 0, 1, 1),):
        rows, columns = -(-(height - top) // down), -(-(width - left) // right)
        num += rows * (1 + -(-columns * bits // 8)) if rows > 0 and columns > 0 else 0
    return num


def check_tiff(data: bytes, tags: Mapping[int, Any]) -> None:
    """Check the zlib checksums of a TIFF's first picture, where it is compressed so; raises DamagedError.

    Args:
        tags: values by the numbers of the TIFF specification.
    """
    if tags.get(TIFF_COMPRESSION) not in TIFF_DEFLATE:
        return
    for offsets, lengths in TIFF_PARTS:
        for start, length in zip(_as_tuple(tags.get(offsets)), _as_tuple(tags.get(lengths)), strict=False):
            inflator, packed = zlib.decompressobj(), data[start : start + length]
            try:
                while packed and not inflator.eof:
                    inflator.decompress(packed, BLOCK)
                    packed = inflator.unconsumed_tail
            except zlib.error as error:
                raise DamagedError("its image data or their checksum is wrong") from error
            if not inflator.eof:
                raise DamagedError("its image data ends early")


def _as_tuple(value: Any) -> tuple[int, ...]:
    return () if value is None else value if isinstance(value, tuple) else (value,)


def exif_orientation(exif: bytes) -> int | None:
    """Read the orientation of an EXIF block, with or without its prefix; None if it has none that can be read."""
    tiff = exif.removeprefix(EXIF)
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return None
    try:
        (start,) = struct.unpack_from(order + "I", tiff, 4)
        (num,) = struct.unpack_from(order + "H", tiff, start)
        for at in range(start + 2, start + 2 + 12 * num, 12):
            tag, kind = struct.unpack_from(order + "HH", tiff, at)
            if tag == 0x112:
                value = struct.unpack_from(order + ("I" if kind == 4 else "H"), tiff, at + 8)[0]
                return value if 1 <= value <= 8 else None
    except struct.error:
        pass
    return None


def _png(data: bytes) -> Essence:
    header: tuple[int, ...] | None = None
    kept, texts, packed = [PNG_SIGNATURE], [], []
    transparency, palette = b"", False
    orientation: int | None = None
    for kind, content, chunk, sound in _png_chunks(data):
        critical = not kind[0] & 0x20
        if not sound and (critical or kind == PNG_TRANSPARENCY):
            raise DamagedError(f"the checksum of its chunk {kind.decode('latin-1')!a} is wrong")
        if header is None:
            if kind != b"IHDR" or len(content) != 13:
                raise DamagedError("it does not begin with a header")
            header = struct.unpack(">IIBBBBB", content)
        elif kind == b"IHDR" or (critical and kind not in (b"PLTE", b"IDAT", b"IEND")):
            raise DamagedError(f"it has a chunk {kind.decode('latin-1')!a} that is not known or stands there twice")
        if kind == PNG_TRANSPARENCY and header[3] in (GREY, RGB):
            transparency = content
        elif kind == b"IDAT":
            if header[3] == PALETTE and not palette:
                raise DamagedError("it has no palette before its image data")
            packed.append(content)
        elif kind == b"IEND":
            image_data = b"".join([*packed, PNG_SENTINEL])
            # Pillow does not look at this checksum, and those of the file are right.
            kept += [len(image_data).to_bytes(4, "big"), b"IDAT", image_data, bytes(4), chunk]
        elif critical or kind == PNG_TRANSPARENCY:
            if kind == b"PLTE":
                palette = True
                if header[3] == PALETTE and (not content or len(content) % 3 or len(content) > 3 * 256):
                    raise DamagedError(
                        f"its palette has {len(content)} bytes, allowed are 3 for each of 1 to 256 colors"
                    )
            kept.append(chunk)
        elif kind == b"eXIf" and sound:
            orientation = orientation or exif_orientation(content)
        elif kind in PNG_TEXTS and sound and len(content) < TEXT_BYTES:
            texts.append((kind, content))
    assert header is not None
    for kind, content in texts if orientation is None else ():
        orientation = orientation or _text_orientation(kind, content)
    key = None
    if header[3] in (GREY, RGB) and len(transparency) == 2 * CHANNELS[header[3]]:
        key = tuple(
            value & (2 ** header[2] - 1) for value in struct.unpack(f">{len(transparency) // 2}H", transparency)
        )
    num_bytes = _png_bytes(header[0], header[1], header[2] * CHANNELS.get(header[3], 0), bool(header[6]))
    return Essence(b"".join(kept), orientation or 1, key, header[2], b"".join(packed), num_bytes)


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes, bytes, bool]]:
    """Yield kind, content, whole chunk, and whether its checksum is right, up to the last chunk; what follows is none
    of the image."""
    at, kind = len(PNG_SIGNATURE), b""
    while kind != b"IEND":
        if at + 12 > len(data):
            raise DamagedError("it ends before its last chunk")
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if end > len(data):
            raise DamagedError("it ends within a chunk")
        content = data[at + 8 : end - 4]
        sound = zlib.crc32(data[at + 4 : end - 4]) == int.from_bytes(data[end - 4 : end], "big")
        yield kind, content, data[at:end], sound
        at = end


def _text_orientation(kind: bytes, content: bytes) -> int | None:
    """The orientation that a PNG's text holds, as ImageMagick (raw EXIF in hex) and Adobe (XMP) write it."""
    keyword, _, text = content.partition(b"\0")
    try:
        if kind == b"zTXt":
            text = zlib.decompressobj().decompress(text[1:], TEXT_BYTES)
        if keyword == b"XML:com.adobe.xmp":
            return _xmp_orientation(text)
        if keyword in (b"Raw profile type exif", b"Raw profile type APP1"):
            return exif_orientation(bytes.fromhex("".join(text.decode("ascii").split()[2:])))
    except (zlib.error, ValueError):
        pass
    return None


def _xmp_orientation(xmp: bytes) -> int | None:
    match = XMP_ORIENTATION.search(xmp)
    return int(match[1]) if match else None


def _jpeg(data: bytes) -> Essence:
    """Walk from marker to marker up to the end marker; what follows it is none of the image."""
    kept, at, num_scans, interval = [b"\xff\xd8"], 2, 0, 0
    exif = xmp = None
    while True:
        match = JPEG_MARKER.search(data, at)
        if match is None:
            raise DamagedError("it has no end marker")
        marker, at = match[1][0], match.end()
        if marker == EOI:
            break
        if marker == SOI or 0xD0 <= marker <= 0xD7 or marker == 0x01:
            continue
        end = at + int.from_bytes(data[at : at + 2], "big")
        if end < at + 2 or end > len(data):
            raise DamagedError("it ends within a segment")
        content = data[at + 2 : end]
        if marker == 0xE0:
            if content.startswith(b"JFIF\0"):
                kept.append(JFIF)
        elif marker == 0xE1:
            exif = content if exif is None and content.startswith(EXIF) else exif
            xmp = content if xmp is None and content.startswith(XMP) else xmp
        elif not (0xE2 <= marker <= 0xEF or marker == COM) or (marker == ADOBE and _is_adobe(content)):
            kept.append(b"\xff" + match[1] + data[at:end])
        at = end
        if marker == DRI and len(content) == 2:
            interval = int.from_bytes(content, "big")
        if marker == SOS:
            num_scans += 1
            at = _end_of_scan(data, at, interval)
            kept.append(data[end:at])
    if not num_scans:
        raise DamagedError("it has no image data")
    orientation = exif_orientation(exif) if exif else None
    if orientation is None and xmp:
        orientation = _xmp_orientation(xmp)
    return Essence(b"".join([*kept, b"\xff\xd9"]), orientation or 1)


def _is_adobe(content: bytes) -> bool:
    return content.startswith(b"Adobe") and len(content) >= ADOBE_BYTES


def _end_of_scan(data: bytes, start: int, interval: int) -> int:
    """Where the first marker after a scan's data begins; its restart markers must count from 0 to 7 and on."""
    for index, match in enumerate(JPEG_MARKER.finditer(data, start)):
        marker = match[1][0]
        if not 0xD0 <= marker <= 0xD7:
            return match.start()
        if interval and marker - 0xD0 != index % 8:
            raise DamagedError("a part of its image data is missing")
    raise DamagedError("it has no end marker")


def _check_gif(data: bytes) -> None:
    """Walk from block to block up to the trailer."""
    at = 13 + _table_bytes(data[10:11])
    while True:
        block, at = data[at : at + 1], at + 1
        if block == b";":
            return
        if block == b"\0":  # some encoders pad blocks
            continue
        if block == b"!":
            at += 1
        elif block == b",":
            at += 10 + _table_bytes(data[at + 8 : at + 9])
        elif not block:
            raise DamagedError("it has no end marker")
        else:
            raise DamagedError("it has a block of an unknown kind")
        while data[at : at + 1] not in (b"", b"\0"):
            at += 1 + data[at]
        at += 1


def _table_bytes(flags: bytes) -> int:
    """Bytes of a GIF's color table."""
    return 3 * 2 ** ((flags[0] & 7) + 1) if flags and flags[0] & 0x80 else 0
