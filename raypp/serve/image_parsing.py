"""Images of a request body: PNG and NPY."""

from __future__ import annotations

import ast
import math
import struct
import zlib
from functools import lru_cache
from typing import Any

import numpy as np

from raypp.serve.admission import Limits, RequestError
from raypp.utils.errors import DataError
from raypp.utils.image_png import PNG_SIGNATURE, Chunk, read_chunks
from raypp.utils.image_structure import DamagedError
from raypp.utils.images import Pixels, decode

NPY_SIGNATURE = b"\x93NUMPY"
GRAY, RGB = 0, 2  # PNG color types
NPY_KEYS = {"descr", "fortran_order", "shape"}
MAX_NPY_HEADER = 1024  # bytes
MAX_PNG_CHUNKS = 1000
MAX_CHUNK_BYTES = {b"gAMA": 4, b"sRGB": 1, b"cHRM": 32, b"pHYs": 9, b"tIME": 7, b"sBIT": 3, b"bKGD": 6}
"""Display settings, each allowed once. Text, EXIF, profiles or many chunks can leak more of an original than its
image."""

Shape = tuple[int, int, int]
"""(H, W, C)."""


def too_many_images(limits: Limits) -> RequestError:
    return RequestError(413, "too-many-images", f"the request holds more than the {limits.images} images allowed")


def parse_png(data: bytes, where: str, shape: Shape) -> Pixels:
    """Decode an 8-bit PNG of this shape that holds only the image and display settings, which are ignored."""
    if not data.startswith(PNG_SIGNATURE):
        raise RequestError(422, "not-png", f"{where} is no PNG image")
    _check_image_data(_check_chunks(data, where, shape), where, shape)
    try:
        return decode(data, name=where, channels=shape[2], max_pixels=shape[0] * shape[1])
    except DataError as error:
        raise RequestError(422, "damaged-image", str(error)) from error


def _check_chunks(data: bytes, where: str, shape: Shape) -> bytes:
    """Return the compressed image data of a PNG file; refuse metadata and data after the end."""
    chunks: list[Chunk] = []
    try:
        for chunk in read_chunks(data):
            if len(chunks) == MAX_PNG_CHUNKS or (chunks and chunk.kind == b"IHDR"):
                raise RequestError(422, "damaged-image", f"{where} has chunks that no PNG image of this size has")
            if not chunks:
                _check_header(chunk, where, shape)
            if not chunk.is_valid:
                raise RequestError(422, "damaged-image", f"{where} is a damaged PNG image")
            _check_kind(chunk, where, is_repeated=any(chunk.kind == other.kind for other in chunks))
            chunks.append(chunk)
    except DamagedError as error:
        raise RequestError(422, "damaged-image", f"{where} is a truncated PNG image") from error
    num_trailing = len(data) - len(PNG_SIGNATURE) - sum(len(chunk.data) for chunk in chunks)
    if num_trailing:
        raise RequestError(422, "trailing-bytes", f"{where} has {num_trailing} bytes after the image's end")
    return b"".join(chunk.content for chunk in chunks if chunk.kind == b"IDAT")


def _check_kind(chunk: Chunk, where: str, *, is_repeated: bool) -> None:
    kind, num = chunk.kind, len(chunk.content)
    if kind == b"IEND" and num:
        raise RequestError(422, "trailing-bytes", f"{where} has {num} bytes in its last chunk, which must be empty")
    if kind in {b"IHDR", b"IDAT", b"IEND"}:
        return
    if kind[:1].isupper():  # a critical chunk, such as a palette
        raise RequestError(422, "not-png", f"{where} has a PNG chunk that an 8-bit image of this kind does not have")
    if num > MAX_CHUNK_BYTES.get(kind, -1) or is_repeated:
        name = kind.decode("ascii") if kind.isalpha() else "of an unknown kind"
        raise RequestError(
            422, "metadata", f"{where} carries metadata ({name}), which may reveal more of an original than a "
            "protected image does; leave it out",
        )  # fmt: skip


def _check_header(chunk: Chunk, where: str, shape: Shape) -> None:
    if chunk.kind != b"IHDR" or len(chunk.content) != 13:
        raise RequestError(422, "damaged-image", f"{where} is a damaged PNG image")
    width, height, depth, color, *_, interlaced = struct.unpack(">IIBBBBB", chunk.content)
    expected, name = (RGB, "RGB") if shape[2] == 3 else (GRAY, "grayscale")
    if (height, width) != shape[:2]:
        reason = f"{where} is {height} x {width}; this classifier reads {_format_shape(shape)}"
        raise RequestError(422, "wrong-shape", reason)
    if depth != 8 or color != expected:
        raise RequestError(422, "wrong-shape", f"{where} is no 8-bit {name} image")
    if interlaced:
        raise RequestError(422, "not-png", f"{where} is interlaced; allowed are images without interlacing")


def _check_image_data(compressed: bytes, where: str, shape: Shape) -> None:
    """Refuse image data that does not decompress to exactly one image; decompresses no more than that."""
    height, width, channels = shape
    num_bytes = height * (1 + width * channels)  # one byte for the filter type of each row
    stream = zlib.decompressobj()
    try:
        values = stream.decompress(compressed, num_bytes + 1)
    except zlib.error as error:
        raise RequestError(422, "damaged-image", f"{where} is a damaged PNG image") from error
    if len(values) != num_bytes or not stream.eof or stream.unused_data:
        raise RequestError(422, "damaged-image", f"{where} holds other data than an image of its size has")


@lru_cache(maxsize=64)  # clients send few different headers, and parsing one takes as long as creating a tensor
def _parse_npy_header(header: bytes) -> tuple[Any, Any, tuple[Any, ...]]:
    """dtype, order and shape. Stricter than ``numpy.lib.format``, which accepts comments, repeated keys and bools."""
    text = header.decode("ascii")
    tree = ast.parse(text.strip(), mode="eval")
    values = ast.literal_eval(tree)
    # Other keys and comments could hold more than the image.
    if values.keys() != NPY_KEYS or len(getattr(tree.body, "keys", ())) != len(NPY_KEYS) or "#" in text:
        raise ValueError("the header has other keys, a key twice, or a comment")
    dims = tuple(values["shape"])
    if any(type(n) is not int for n in dims):
        raise ValueError("the header has a side that is no integer")
    return values["descr"], values["fortran_order"], dims


def parse_npy(data: bytes, where: str, shape: Shape, limits: Limits, num_before: int = 0) -> Pixels:
    """Read a NumPy file of uint8 (H, W, C) or (N, H, W, C) in C order, after ``num_before`` images of the request."""
    if not data.startswith(NPY_SIGNATURE) or len(data) < 12:
        raise RequestError(422, "not-npy", f"{where} is no NumPy file")
    version = data[6]
    start = 12 if version >= 2 else 10
    length = int.from_bytes(data[8:start], "little")
    if version not in (1, 2, 3) or length > MAX_NPY_HEADER or start + length > len(data):
        raise RequestError(422, "not-npy", f"{where} is no NumPy file of a known version")
    try:
        dtype, fortran_order, dims = _parse_npy_header(data[start : start + length])
    except (ValueError, SyntaxError, AttributeError, TypeError, MemoryError, RecursionError) as error:
        raise RequestError(422, "not-npy", f"{where} has a damaged NumPy header") from error
    if dtype not in ("|u1", "u1", "uint8") or fortran_order is not False:
        reason = f"{where} does not hold uint8 values in C order; allowed are only 8-bit images"
        raise RequestError(422, "wrong-type", reason)
    if len(dims) not in (3, 4) or dims[-3:] != shape or (len(dims) == 4 and dims[0] < 1):
        reason = f"{where} has shape {dims[:6]}; this classifier reads {_format_shape(shape)}, one or a batch"
        raise RequestError(422, "wrong-shape", reason)
    num = dims[0] if len(dims) == 4 else 1
    if num_before + num > limits.images:
        raise too_many_images(limits)
    values = memoryview(data)[start + length :]
    num_values = num * math.prod(shape)
    if len(values) != num_values:
        raise RequestError(422, "damaged-image", f"{where} holds {len(values)} bytes for {num_values} values")
    return np.frombuffer(values, np.uint8).reshape(num, *shape)


def _format_shape(shape: Shape) -> str:
    return f"{shape[0]} x {shape[1]} with {shape[2]} channel{'s' * (shape[2] > 1)}"
