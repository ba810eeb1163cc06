"""What a request's body may be: one image or a batch, as PNG or NumPy file, of exactly the shape that is served.

Everything is decided from headers and lengths before a pixel is decoded, and only what is needed of a file is decoded
at all: of a PNG the image data, of a NumPy file raw bytes, never pickles.
"""

from __future__ import annotations

import ast
import asyncio
import logging
import math
import struct
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from raypp.utils.errors import DataError, RayppError, first_line
from raypp.utils.images import Pixels, decode
from raypp.utils.registry import did_you_mean

PNG, NPY, MULTIPART = "image/png", "application/x-npy", "multipart/form-data"
ANY = "application/octet-stream"  # what clients state who know nothing of a file
PART_TYPES = ("", ANY, PNG, NPY)
PNG_SIGNATURE, NPY_SIGNATURE = b"\x89PNG\r\n\x1a\n", b"\x93NUMPY"
GREY, RGB = 0, 2  # PNG's colour types
MAX_NPY_HEADER = 1024
MAX_PNG_CHUNKS = 1000
SMALL_CHUNKS = {b"gAMA": 4, b"sRGB": 1, b"cHRM": 32, b"pHYs": 9, b"tIME": 7, b"sBIT": 3, b"bKGD": 6}
"""What else a PNG may hold, once, and of at most how many bytes: how to show it. Text, EXIF, a profile or many of these
can carry more of an original than its image."""
DECODED_AT_ONCE = 2**15  # values of PNG images: ten of 32 x 32
MAX_TEXT_FIELDS = 16  # that are looked at, for their names in an answer
MAX_PART_HEADER = 512  # bytes of a form's part: its field and a file's name

T = TypeVar("T")

logging.getLogger("python_multipart").setLevel(logging.ERROR)  # its warnings quote bytes of the body


class RefusedError(RayppError):
    """A request that is answered by an error of the client's making.

    Args:
        status: HTTP status.
        code: a stable name of the problem, for programs.
        more: what else the problem document says, for programs too.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        headers: dict[str, str] | None = None,
        more: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.headers, self.more = status, code, headers or {}, more or {}


@dataclass(frozen=True)
class Limits:
    """What one request may hold at most, and all together that wait for the classifier."""

    body: int = 16 * 2**20
    """Bytes."""
    images: int = 256
    seconds: float = 30.0
    """Until a request is given up."""
    idle: float = 5.0
    """Seconds between two parts of a body."""
    waiting: int = 4096
    """Images that wait in a replica: it counts requests by itself, and 128 full ones would wait longer than that."""


class Waiting:
    """How many images wait for the classifier, itself included; for one event loop."""

    def __init__(self, most: int) -> None:
        self.most, self.now = most, 0

    @contextmanager
    def admitted(self, num: int) -> Iterator[None]:
        """Count ``num`` images while they wait, or raise RefusedError (503); a first request always may."""
        if self.now and self.now + num > self.most:
            raise RefusedError(
                503,
                "busy",
                f"{self.now} images wait already, with these {num} more than {self.most}; come back after Retry-After",
                {"Retry-After": "1"},
            )
        self.now += num
        try:
            yield
        finally:
            self.now -= num


Shape = tuple[int, int, int]
"""(H, W, C)."""


async def read_body(chunks: AsyncIterator[bytes], length: str | None, limits: Limits) -> bytes:
    """The whole body, refused as soon as it is known to be too large; ``length`` is the header Content-Length."""
    if length is not None and length.isascii() and length.isdigit() and int(length) > limits.body:
        raise _too_large(limits)
    parts: list[bytes] = []
    size = 0
    coming = aiter(chunks)
    while True:
        try:
            async with asyncio.timeout(limits.idle):  # else slow senders would hold every place of a replica
                chunk = await anext(coming)
        except StopAsyncIteration:
            break
        except TimeoutError as error:
            raise RefusedError(408, "too-slow", f"nothing of the body came for {limits.idle:g} s") from error
        size += len(chunk)
        if size > limits.body:
            raise _too_large(limits)
        parts.append(chunk)
    return b"".join(parts)


def _too_large(limits: Limits) -> RefusedError:
    return RefusedError(413, "body-too-large", f"the body is larger than the {limits.body:,} bytes allowed")


async def read_images(
    body: bytes, content_type: str, shape: Shape, limits: Limits, plain: Shape | None = None
) -> tuple[Pixels, Pixels | None]:
    """Images of a request.

    Args:
        shape: (H, W, C) that every image must have.
        plain: likewise for those of the form's field ``plain``; None allows no such field.

    Returns:
        uint8 (N, H, W, C), and as many images of the field ``plain``, if the form has it.

    Raises:
        RefusedError: 400, 413, 415 or 422, with a sentence.
    """
    kind = content_type.partition(";")[0].strip().lower()
    if kind == PNG:
        return await _aside(lambda: _png(body, "the body", shape)[None], math.prod(shape)), None
    if kind == NPY:
        return _npy(body, "the body", shape, limits), None
    if kind == MULTIPART:
        shapes = {"image": shape} | ({"plain": plain} if plain is not None else {})
        return await _multipart(body, content_type, shapes, limits)
    sent = f"Content-Type {kind[:60]!r} is not read here" if kind else "there is no Content-Type"
    raise RefusedError(
        415,
        "unsupported-type",
        f"{sent}; allowed are {PNG}, {NPY} and {MULTIPART} (lossy formats destroy what the classifier reads)",
        {"Accept": f"{PNG}, {NPY}, {MULTIPART}"},
    )


async def _multipart(
    body: bytes, content_type: str, shapes: dict[str, Shape], limits: Limits
) -> tuple[Pixels, Pixels | None]:
    async def stream() -> AsyncGenerator[bytes, None]:
        yield body

    boundary = parse_options_header(content_type)[1].get(b"boundary", b"")
    if not boundary:
        raise RefusedError(
            400, "bad-form", f"Content-Type {MULTIPART} names no boundary; let your HTTP library write the header"
        )
    allowed = " and ".join(repr(name) for name in shapes)
    parser = MultiPartParser(
        Headers({"content-type": content_type}), stream(), max_files=2 * limits.images, max_fields=MAX_TEXT_FIELDS,
        max_part_size=limits.body,
    )  # fmt: skip
    parser.spool_max_size = limits.body + 1  # in memory: no image is ever written to disk
    try:
        form = await parser.parse()
    except (MultiPartException, MultipartParseError, KeyError, ValueError, UnicodeError) as error:
        reason = getattr(error, "message", "") or first_line(error)
        if reason.startswith("Too many files"):
            raise _too_many(limits) from error
        if reason.startswith("Too many fields"):
            raise RefusedError(
                422, "unknown-field", f"the form has more than {MAX_TEXT_FIELDS} text fields; allowed are files in "
                f"{allowed}",
            ) from error  # fmt: skip
        raise RefusedError(400, "bad-form", f"the form cannot be read: {reason}") from error
    # Batches as they are, which takes no decoding; PNG files when it is known that they are not too many.
    found: dict[str, list[Pixels | bytes]] = {name: [] for name in shapes}
    counts = dict.fromkeys(shapes, 0)
    try:
        if not body.rstrip(b"\r\n").endswith(b"--" + boundary + b"--"):
            raise RefusedError(400, "bad-form", "the form cannot be read: something follows its end, or it has none")
        for name, value in form.multi_items():
            if not isinstance(value, UploadFile):
                raise RefusedError(
                    422, "unknown-field", f"the form has a text field {name[:50]!r}; allowed are files (parts with a "
                    f"filename) in {allowed}",
                )  # fmt: skip
            if name not in found:
                raise RefusedError(
                    422, "unknown-field", f"the form has a file in field {name[:50]!r}{did_you_mean(name, shapes)}; "
                    f"allowed are files in {allowed}",
                )  # fmt: skip
            where = f"file {len(found[name]) + 1} of field {name!r}"
            kind = _part_type(value.headers, where)
            data = await value.read()
            is_npy = kind == NPY or (kind != PNG and data.startswith(NPY_SIGNATURE))
            part = _npy(data, where, shapes[name], limits, counts[name]) if is_npy else data
            found[name].append(part)
            counts[name] += 1 if isinstance(part, bytes) else len(part)
            if counts[name] > limits.images:
                raise _too_many(limits)
    finally:
        await form.close()
    if not counts["image"]:
        raise RefusedError(422, "no-image", "the form holds no file in field 'image'")
    if counts.get("plain", 0) not in (0, counts["image"]):
        raise RefusedError(
            422, "wrong-number", f"field 'plain' holds {counts['plain']} images, field 'image' {counts['image']}"
        )

    def images(name: str) -> Pixels:
        return np.concatenate(
            [
                _png(part, f"file {number} of field {name!r}", shapes[name])[None] if isinstance(part, bytes) else part
                for number, part in enumerate(found[name], 1)
            ]
        )

    both = [name for name in shapes if counts[name]]
    values = sum(math.prod(shapes[name]) for name in both for part in found[name] if isinstance(part, bytes))
    read = await _aside(lambda: {name: images(name) for name in both}, values)
    return read["image"], read.get("plain")


def _part_type(headers: Headers, where: str) -> str:
    """The type that a form's part states, one of ``PART_TYPES``; refuses others, among them forms within the form, and
    headers with room for more than an image's name."""
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind.startswith("multipart/"):
        raise RefusedError(
            415, "unsupported-type", f"{where} is {kind[:60]!r}, several parts in one; send each image as a file of "
            "the form itself",
        )  # fmt: skip
    others = sorted({name.lower() for name in headers.keys()} - {"content-disposition", "content-type"})  # noqa: SIM118
    if others or sum(map(len, headers.values())) > MAX_PART_HEADER:
        extra = f"the header {others[0][:50]!r}" if others else "long headers"
        raise RefusedError(
            422, "metadata", f"{where} has {extra}, which may tell more than its image does; allowed are "
            "Content-Disposition and Content-Type, short ones",
        )  # fmt: skip
    if kind not in PART_TYPES:
        raise RefusedError(
            415, "unsupported-type", f"{where} is {kind[:60]!r}, which is not read here; allowed are {PNG} and {NPY}, "
            f"or {ANY}, which may be either",
        )  # fmt: skip
    return kind


async def _aside(function: Callable[[], T], values: int) -> T:
    """Decode so many values: in a thread where that takes longer than a thread costs, since other requests wait."""
    return await asyncio.to_thread(function) if values > DECODED_AT_ONCE else function()


def _too_many(limits: Limits) -> RefusedError:
    return RefusedError(413, "too-many-images", f"the request holds more than the {limits.images} images allowed")


def _png(data: bytes, where: str, shape: Shape) -> Pixels:
    """An 8-bit PNG of the given shape, with nothing in it but the image and how to show it, which is passed over."""
    if not data.startswith(PNG_SIGNATURE):
        raise RefusedError(422, "not-png", f"{where} is no PNG image")
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
            raise RefusedError(422, "damaged-image", f"{where} has chunks that no PNG image of this size has")
        if not kinds:
            _check_header(kind, data[at + 8 : end - 4], where, shape)
        if zlib.crc32(data[at + 4 : end - 4]) != struct.unpack_from(">I", data, end - 4)[0]:
            raise RefusedError(422, "damaged-image", f"{where} is a damaged PNG image")
        kinds.append(kind)
        if kind in {b"IHDR", b"IDAT", b"IEND"}:
            kept.append(data[at:end])
            if kind == b"IDAT":
                packed.append(data[at + 8 : end - 4])
            if kind == b"IEND" and length:
                raise RefusedError(422, "trailing-bytes", f"{where} goes on for {length} bytes in its last chunk")
        elif kind[:1].isupper():  # a critical chunk, as a palette, which these colour types do not have
            raise RefusedError(
                422, "not-png", f"{where} has a PNG chunk that an 8-bit image of this kind does not have"
            )
        elif length > SMALL_CHUNKS.get(kind, -1) or kinds.count(kind) > 1:
            name = kind.decode("ascii") if kind.isalpha() else "of an unknown kind"
            raise RefusedError(
                422, "metadata", f"{where} carries metadata ({name}), which may tell more of an original than a "
                "protected image does; leave it out",
            )  # fmt: skip
        at = end
    if not kinds or kinds[-1] != b"IEND":
        raise RefusedError(422, "damaged-image", f"{where} is a truncated PNG image")
    if at != len(data):
        raise RefusedError(422, "trailing-bytes", f"{where} goes on for {len(data) - at} bytes after the image's end")
    _check_values(b"".join(packed), where, shape)
    try:
        image = decode(b"".join(kept), name=where, channels=shape[2], max_pixels=shape[0] * shape[1])
    except DataError as error:
        raise RefusedError(422, "damaged-image", str(error)) from error
    if image.shape != shape:
        raise RefusedError(422, "wrong-shape", f"{where} has not the shape that its header says")
    return image


def _check_header(kind: bytes, header: bytes, where: str, shape: Shape) -> None:
    if kind != b"IHDR" or len(header) != 13:
        raise RefusedError(422, "damaged-image", f"{where} is a damaged PNG image")
    width, height, depth, colour = struct.unpack(">IIBB", header[:10])
    wanted = RGB if shape[2] == 3 else GREY
    if (height, width) != shape[:2]:
        raise RefusedError(422, "wrong-shape", f"{where} is {height} x {width}; this classifier reads {_said(shape)}")
    if depth != 8 or colour != wanted:
        raise RefusedError(422, "wrong-shape", f"{where} is no 8-bit {'RGB' if wanted == RGB else 'grey'} image")
    if header[12]:
        raise RefusedError(422, "not-png", f"{where} is interlaced; allowed are images that are not")


def _check_values(packed: bytes, where: str, shape: Shape) -> None:
    """Refuse image data that does not unpack to exactly the image; unpacks no more than that."""
    height, width, channels = shape
    expected = height * (1 + width * channels)  # a filter's number before each row
    stream = zlib.decompressobj()
    try:
        values = stream.decompress(packed, expected + 1)
    except zlib.error as error:
        raise RefusedError(422, "damaged-image", f"{where} is a damaged PNG image") from error
    if len(values) != expected or not stream.eof or stream.unused_data:
        raise RefusedError(422, "damaged-image", f"{where} holds other data than an image of its size has")


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


def _npy(data: bytes, where: str, shape: Shape, limits: Limits, num_before: int = 0) -> Pixels:
    """A NumPy file of uint8 (H, W, C) or (N, H, W, C), in C order; ``num_before`` images came before it."""
    if not data.startswith(NPY_SIGNATURE) or len(data) < 12:
        raise RefusedError(422, "not-npy", f"{where} is no NumPy file")
    major, wide = data[6], data[6] >= 2
    length = struct.unpack_from("<I" if wide else "<H", data, 8)[0]
    begin = 12 if wide else 10
    if major not in (1, 2, 3) or length > MAX_NPY_HEADER or begin + length > len(data):
        raise RefusedError(422, "not-npy", f"{where} is no NumPy file of a known version")
    try:
        kind, order, dims = _npy_header(data[begin : begin + length])
    except (ValueError, SyntaxError, AttributeError, TypeError, MemoryError, RecursionError) as error:
        raise RefusedError(422, "not-npy", f"{where} has a damaged NumPy header") from error
    if kind not in ("|u1", "u1", "uint8") or order is not False:
        raise RefusedError(422, "wrong-type", f"{where} holds no uint8 values in C order: an upload is an 8-bit image")
    if any(type(n) is not int for n in dims):
        raise RefusedError(422, "not-npy", f"{where} has a damaged NumPy header")
    if len(dims) not in (3, 4) or dims[-3:] != shape or (len(dims) == 4 and dims[0] < 1):
        raise RefusedError(
            422, "wrong-shape", f"{where} has shape {dims[:6]}; this classifier reads {_said(shape)}, one or a batch"
        )
    num = dims[0] if len(dims) == 4 else 1
    if num_before + num > limits.images:
        raise _too_many(limits)
    values = memoryview(data)[begin + length :]
    if len(values) != num * math.prod(shape):
        raise RefusedError(
            422, "damaged-image", f"{where} holds {len(values)} bytes for {num * math.prod(shape)} values"
        )
    return np.frombuffer(values, np.uint8).reshape(num, *shape)


def _said(shape: Shape) -> str:
    return f"{shape[0]} x {shape[1]} with {shape[2]} channel{'s' * (shape[2] > 1)}"
