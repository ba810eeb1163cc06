"""Read PNG files: check chunks, checksums and the amount of image data, and drop metadata."""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from raypp.utils.image_structure import DamagedError, PictureData, exif_orientation, inflate, xmp_orientation

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
TRANSPARENCY = b"tRNS"
TEXTS = (b"tEXt", b"zTXt", b"iTXt")
GREY, RGB, PALETTE = 0, 2, 3  # PNG's numbers of color types
CHANNELS = {GREY: 1, RGB: 3, PALETTE: 1, 4: 2, 6: 4}
ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
"""First row and column, and steps between rows and between columns, of each pass of an interlaced PNG."""
# Pillow refuses image data that ends early, but not data that lacks only its checksum. With these bytes appended, it
# reads a wrong checksum there. Complete image data ends before them.
SENTINEL = hashlib.sha512(b"not image data").digest()
MAX_TEXT_BYTES = 2**16  # of a text that may hold an orientation


class _Header(NamedTuple):
    width: int
    height: int
    bit_depth: int
    color_type: int
    compression: int
    filters: int
    interlaced: int


class Chunk(NamedTuple):
    kind: bytes
    content: bytes
    data: bytes
    """The whole chunk with length and checksum."""
    is_valid: bool
    """Whether the checksum is right."""

    @property
    def is_critical(self) -> bool:
        return not self.kind[0] & 0x20


def read_png(data: bytes) -> PictureData:
    """Check the structure and all checksums that matter to the picture; raises DamagedError."""
    header: _Header | None = None
    data_without_metadata, image_data, texts = [PNG_SIGNATURE], [], []
    transparency, has_palette = b"", False
    orientation: int | None = None
    for chunk in read_chunks(data):
        header = _check_chunk(chunk, header)
        if chunk.kind == TRANSPARENCY and header.color_type in (GREY, RGB):
            transparency = chunk.content
        elif chunk.kind == b"IDAT":
            if header.color_type == PALETTE and not has_palette:
                raise DamagedError("it has no palette before its image data")
            image_data.append(chunk.content)
        elif chunk.kind == b"IEND":
            merged = b"".join([*image_data, SENTINEL])
            # Pillow does not check this chunk's checksum; those of the file are right.
            data_without_metadata += [len(merged).to_bytes(4, "big"), b"IDAT", merged, bytes(4), chunk.data]
        elif chunk.is_critical or chunk.kind == TRANSPARENCY:
            has_palette |= chunk.kind == b"PLTE"
            data_without_metadata.append(chunk.data)
        elif chunk.kind == b"eXIf" and chunk.is_valid:
            orientation = orientation or exif_orientation(chunk.content)
        elif chunk.kind in TEXTS and chunk.is_valid and len(chunk.content) < MAX_TEXT_BYTES:
            texts.append(chunk)
    assert header is not None
    if orientation is None:
        orientation = next(filter(None, map(_text_orientation, texts)), None)
    return PictureData(
        b"".join(data_without_metadata),
        orientation or 1,
        _transparent_color(header, transparency),
        header.bit_depth,
        b"".join(image_data),
        _image_data_bytes(header),
    )


def check_png(picture: PictureData) -> None:
    """Check that the image data decompresses to all pixels; raises DamagedError.

    Pillow fills missing pixels with black where the data ends early but validly.
    """
    num, _ = inflate(picture.packed, picture.num_bytes)
    if num < picture.num_bytes:
        raise DamagedError("its image data ends early")


def read_chunks(data: bytes) -> Iterator[Chunk]:
    """Yield the chunks up to the last one; bytes after it do not belong to the image."""
    start, kind = len(PNG_SIGNATURE), b""
    while kind != b"IEND":
        if start + 12 > len(data):
            raise DamagedError("it ends before its last chunk")
        length, kind = struct.unpack_from(">I4s", data, start)
        end = start + 12 + length
        if end > len(data):
            raise DamagedError("it ends within a chunk")
        is_valid = zlib.crc32(data[start + 4 : end - 4]) == int.from_bytes(data[end - 4 : end], "big")
        yield Chunk(kind, data[start + 8 : end - 4], data[start:end], is_valid)
        start = end


def _check_chunk(chunk: Chunk, header: _Header | None) -> _Header:
    """Return the header, which is the first chunk; raises DamagedError if the chunk is not allowed in its place."""
    kind, content = chunk.kind, chunk.content
    if not chunk.is_valid and (chunk.is_critical or kind == TRANSPARENCY):
        raise DamagedError(f"the checksum of its chunk {kind.decode('latin-1')!a} is wrong")
    if header is None:
        if kind != b"IHDR" or len(content) != 13:
            raise DamagedError("it does not begin with a header")
        return _Header(*struct.unpack(">IIBBBBB", content))
    if kind == b"IHDR" or (chunk.is_critical and kind not in (b"PLTE", b"IDAT", b"IEND")):
        raise DamagedError(f"it has a chunk {kind.decode('latin-1')!a} that is not known or occurs twice")
    if kind == b"PLTE" and header.color_type == PALETTE and (len(content) % 3 or not 0 < len(content) <= 3 * 256):
        raise DamagedError(f"its palette has {len(content)} bytes, allowed are 3 for each of 1 to 256 colors")
    return header


def _text_orientation(chunk: Chunk) -> int | None:
    """The orientation in a text chunk as ImageMagick (raw EXIF in hex) and Adobe (XMP) write it."""
    keyword, _, text = chunk.content.partition(b"\0")
    try:
        if chunk.kind == b"zTXt":
            text = zlib.decompressobj().decompress(text[1:], MAX_TEXT_BYTES)
        if keyword == b"XML:com.adobe.xmp":
            return xmp_orientation(text)
        if keyword in (b"Raw profile type exif", b"Raw profile type APP1"):
            return exif_orientation(bytes.fromhex("".join(text.decode("ascii").split()[2:])))
    except (zlib.error, ValueError):
        pass
    return None


def _transparent_color(header: _Header, transparency: bytes) -> tuple[int, ...] | None:
    if header.color_type not in (GREY, RGB) or len(transparency) != 2 * CHANNELS[header.color_type]:
        return None
    values = struct.unpack(f">{len(transparency) // 2}H", transparency)
    return tuple(value & (2**header.bit_depth - 1) for value in values)


def _image_data_bytes(header: _Header) -> int:
    """Size of the decompressed image data; each row starts with one byte for its filter."""
    bits_per_pixel = header.bit_depth * CHANNELS.get(header.color_type, 0)
    num_bytes = 0
    for top, left, row_step, column_step in ADAM7 if header.interlaced else ((0, 0, 1, 1),):
        rows, columns = -(-(header.height - top) // row_step), -(-(header.width - left) // column_step)
        num_bytes += rows * (1 + -(-columns * bits_per_pixel // 8)) if rows > 0 and columns > 0 else 0
    return num_bytes
