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
from raypp.utils.images import Pixels, decode

PNG_SIGNATURE, NPY_SIGNATURE = b"\x89PNG\r\n\x1a\n", b"\x93NUMPY"
GREY, RGB = 0, 2  # PNG's colour types
MAX_NPY_HEADER = 1024
MAX_PNG_CHUNKS = 1000
SMALL_CHUNKS = {b"gAMA": 4, b"sRGB": 1, b"cHRM": 32, b"pHYs": 9, b"tIME": 7, b"sBIT": 3, b"bKGD": 6}
"""What else a PNG may hold, once, and of at most how many bytes: how to show it. Text, EXIF, a profile or many of these
can carry more of an original than its image."""


Shape = tuple[int, int, int]
"""(H, W, C)."""


def too_many_images(limits: Limits) -> RequestError:
    return RequestError(413, "too-many-images", f"the request holds more than the {limits.images} images allowed")


def parse_png(data: bytes, where: str, shape: Shape) -> Pixels:
    """An 8-bit PNG of the given shape, with nothing in it but the image and how to show it, which is passed over."""
    if not data.startswith(PNG_SIGNATURE):
        raise RequestError(422, "not-png", f"{where} is no PNG image")
    kept, at = [PNG_SIGNATURE], len(PNG_SIGNATURE)
    kinds: list[bytes] = []
    packed: list[bytes] = []
    while at + 12 <= len(data) and (not kinds or kinds[-1] != b"IEND"):
        (length,) = struct.unpack_from(">I", data, at)
        kind = data[at + 4 : at + 8]
        end = at + 12 + length
        if end > len(data):
            break
        if len(kinds) == MAX_PNG_CHUNKS or (kinds and kind == b"IHDR"):
            raise RequestError(422, "damaged-image", f"{where} has chunks that no PNG image of this size has")
        if not kinds:
            _check_header(kind, data[at + 8 : end - 4], where, shape)
        if zlib.crc32(data[at + 4 : end - 4]) != struct.unpack_from(">I", data, end - 4)[0]:
            raise RequestError(422, "damaged-image", f"{where} is a damaged PNG image")
        kinds.append(kind)
        if kind in {b"IHDR", b"IDAT", b"IEND"}:
            kept.append(data[at:end])
            if kind == b"IDAT":
                packed.append(data[at + 8 : end - 4])
            if kind == b"IEND" and length:
                raise RequestError(422, "trailing-bytes", f"{where} goes on for {length} bytes in its last chunk")
        elif kind[:1].isupper():  # a critical chunk, as a palette, which these colour types do not have
            raise RequestError(
                422, "not-png", f"{where} has a PNG chunk that an 8-bit image of this kind does not have"
            )
        elif length > SMALL_CHUNKS.get(kind, -1) or kinds.count(kind) > 1:
            name = kind.decode("ascii") if kind.isalpha() else "of an unknown kind"
            raise RequestError(
                422, "metadata", f"{where} carries metadata ({name}), which may tell more of an original than a "
                "protected image does; leave it out",
            )  # fmt: skip
        at = end
    if not kinds or kinds[-1] != b"IEND":
        raise RequestError(422, "damaged-image", f"{where} is a truncated PNG image")
    if at != len(data):
        raise RequestError(422, "trailing-bytes", f"{where} goes on for {len(data) - at} bytes after the image's end")
    _check_values(b"".join(packed), where, shape)
    try:
        image = decode(b"".join(kept), name=where, channels=shape[2], max_pixels=shape[0] * shape[1])
    except DataError as error:
        raise RequestError(422, "damaged-image", str(error)) from error
    if image.shape != shape:
        raise RequestError(422, "wrong-shape", f"{where} has not the shape that its header says")
    return image


def _check_header(kind: bytes, header: bytes, where: str, shape: Shape) -> None:
    if kind != b"IHDR" or len(header) != 13:
        raise RequestError(422, "damaged-image", f"{where} is a damaged PNG image")
    width, height, depth, colour = struct.unpack(">IIBB", header[:10])
    wanted = RGB if shape[2] == 3 else GREY
    if (height, width) != shape[:2]:
        raise RequestError(422, "wrong-shape", f"{where} is {height} x {width}; this classifier reads {_said(shape)}")
    if depth != 8 or colour != wanted:
        raise RequestError(422, "wrong-shape", f"{where} is no 8-bit {'RGB' if wanted == RGB else 'grey'} image")
    if header[12]:
        raise RequestError(422, "not-png", f"{where} is interlaced; allowed are images that are not")


def _check_values(packed: bytes, where: str, shape: Shape) -> None:
    """Refuse image data that does not unpack to exactly the image; unpacks no more than that."""
    height, width, channels = shape
    expected = height * (1 + width * channels)  # a filter's number before each row
    stream = zlib.decompressobj()
    try:
        values = stream.decompress(packed, expected + 1)
    except zlib.error as error:
        raise RequestError(422, "damaged-image", f"{where} is a damaged PNG image") from error
    if len(values) != expected or not stream.eof or stream.unused_data:
        raise RequestError(422, "damaged-image", f"{where} holds other data than an image of its size has")


@lru_cache(maxsize=64)  # clients send few different ones, and reading one takes as long as making a tensor
def _npy_header(header: bytes) -> tuple[Any, Any, tuple[Any, ...]]:
    text = header.decode("ascii")
    tree = ast.parse(text.strip(), mode="eval")
    found = ast.literal_eval(tree)
    names = {"descr", "fortran_order", "shape"}
    # Else there is room for more than an image's values.
    if found.keys() != names or len(getattr(tree.body, "keys", ())) != len(names) or "#" in text:
        raise ValueError("a header of other keys, of one twice, or with a comment")
    return found["descr"], found["fortran_order"], tuple(found["shape"])


def parse_npy(data: bytes, where: str, shape: Shape, limits: Limits, num_before: int = 0) -> Pixels:
    """A NumPy file of uint8 (H, W, C) or (N, H, W, C), in C order; ``num_before`` images came before it."""
    if not data.startswith(NPY_SIGNATURE) or len(data) < 12:
        raise RequestError(422, "not-npy", f"{where} is no NumPy file")
    major, wide = data[6], data[6] >= 2
    length = struct.unpack_from("<I" if wide else "<H", data, 8)[0]
    begin = 12 if wide else 10
    if major not in (1, 2, 3) or length > MAX_NPY_HEADER or begin + length > len(data):
        raise RequestError(422, "not-npy", f"{where} is no NumPy file of a known version")
    try:
        kind, order, dims = _npy_header(data[begin : begin + length])
    except (ValueError, SyntaxError, AttributeError, TypeError, MemoryError, RecursionError) as error:
        raise RequestError(422, "not-npy", f"{where} has a damaged NumPy header") from error
    if kind not in ("|u1", "u1", "uint8") or order is not False:
        raise RequestError(422, "wrong-type", f"{where} holds no uint8 values in C order: an upload is an 8-bit image")
    if any(type(n) is not int for n in dims):
        raise RequestError(422, "not-npy", f"{where} has a damaged NumPy header")
    if len(dims) not in (3, 4) or dims[-3:] != shape or (len(dims) == 4 and dims[0] < 1):
        raise RequestError(
            422, "wrong-shape", f"{where} has shape {dims[:6]}; this classifier reads {_said(shape)}, one or a batch"
        )
    num = dims[0] if len(dims) == 4 else 1
    if num_before + num > limits.images:
        raise too_many_images(limits)
    values = memoryview(data)[begin + length :]
    if len(values) != num * math.prod(shape):
        raise RequestError(
            422, "damaged-image", f"{where} holds {len(values)} bytes for {num * math.prod(shape)} values"
        )
    return np.frombuffer(values, np.uint8).reshape(num, *shape)


def _said(shape: Shape) -> str:
    return f"{shape[0]} x {shape[1]} with {shape[2]} channel{'s' * (shape[2] > 1)}"
