"""What a request's body may be: one image or a batch, as PNG or NumPy file, of exactly the shape that is served.

Everything is decided from headers and lengths before a pixel is decoded, and only what is needed of a file is decoded
at all: of a PNG the image data, of a NumPy file raw bytes, never pickles.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import TypeVar

import numpy as np
from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from raypp.serve.admission import Limits, RequestError
from raypp.serve.image_parsing import NPY_SIGNATURE, Shape, parse_npy, parse_png, too_many_images
from raypp.utils.errors import first_line
from raypp.utils.images import Pixels
from raypp.utils.registry import suggest

PNG, NPY, MULTIPART = "image/png", "application/x-npy", "multipart/form-data"
ANY = "application/octet-stream"  # what clients state who know nothing of a file
PART_TYPES = ("", ANY, PNG, NPY)
DECODED_AT_ONCE = 2**15  # values of PNG images: ten of 32 x 32
MAX_TEXT_FIELDS = 16  # that are looked at, for their names in an answer
MAX_PART_HEADER = 512  # bytes of a form's part: its field and a file's name

T = TypeVar("T")

logging.getLogger("python_multipart").setLevel(logging.ERROR)  # its warnings quote bytes of the body


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
            raise RequestError(408, "too-slow", f"nothing of the body came for {limits.idle:g} s") from error
        size += len(chunk)
        if size > limits.body:
            raise _too_large(limits)
        parts.append(chunk)
    return b"".join(parts)


def _too_large(limits: Limits) -> RequestError:
    return RequestError(413, "body-too-large", f"the body is larger than the {limits.body:,} bytes allowed")


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
        return await _aside(lambda: parse_png(body, "the body", shape)[None], math.prod(shape)), None
    if kind == NPY:
        return parse_npy(body, "the body", shape, limits), None
    if kind == MULTIPART:
        shapes = {"image": shape} | ({"plain": plain} if plain is not None else {})
        return await _multipart(body, content_type, shapes, limits)
    sent = f"Content-Type {kind[:60]!r} is not read here" if kind else "there is no Content-Type"
    raise RequestError(
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
        raise RequestError(
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
            raise too_many_images(limits) from error
        if reason.startswith("Too many fields"):
            raise RequestError(
                422, "unknown-field", f"the form has more than {MAX_TEXT_FIELDS} text fields; allowed are files in "
                f"{allowed}",
            ) from error  # fmt: skip
        raise RequestError(400, "bad-form", f"the form cannot be read: {reason}") from error
    # Batches as they are, which takes no decoding; PNG files when it is known that they are not too many.
    found: dict[str, list[Pixels | bytes]] = {name: [] for name in shapes}
    counts = dict.fromkeys(shapes, 0)
    try:
        if not body.rstrip(b"\r\n").endswith(b"--" + boundary + b"--"):
            raise RequestError(400, "bad-form", "the form cannot be read: something follows its end, or it has none")
        for name, value in form.multi_items():
            if not isinstance(value, UploadFile):
                raise RequestError(
                    422, "unknown-field", f"the form has a text field {name[:50]!r}; allowed are files (parts with a "
                    f"filename) in {allowed}",
                )  # fmt: skip
            if name not in found:
                raise RequestError(
                    422, "unknown-field", f"the form has a file in field {name[:50]!r}{suggest(name, shapes)}; "
                    f"allowed are files in {allowed}",
                )  # fmt: skip
            where = f"file {len(found[name]) + 1} of field {name!r}"
            kind = _part_type(value.headers, where)
            data = await value.read()
            is_npy = kind == NPY or (kind != PNG and data.startswith(NPY_SIGNATURE))
            part = parse_npy(data, where, shapes[name], limits, counts[name]) if is_npy else data
            found[name].append(part)
            counts[name] += 1 if isinstance(part, bytes) else len(part)
            if counts[name] > limits.images:
                raise too_many_images(limits)
    finally:
        await form.close()
    if not counts["image"]:
        raise RequestError(422, "no-image", "the form holds no file in field 'image'")
    if counts.get("plain", 0) not in (0, counts["image"]):
        raise RequestError(
            422, "wrong-number", f"field 'plain' holds {counts['plain']} images, field 'image' {counts['image']}"
        )

    def images(name: str) -> Pixels:
        return np.concatenate(
            [
                parse_png(part, f"file {number} of field {name!r}", shapes[name])[None]
                if isinstance(part, bytes)
                else part
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
        raise RequestError(
            415, "unsupported-type", f"{where} is {kind[:60]!r}, several parts in one; send each image as a file of "
            "the form itself",
        )  # fmt: skip
    others = sorted({name.lower() for name in headers.keys()} - {"content-disposition", "content-type"})  # noqa: SIM118
    if others or sum(map(len, headers.values())) > MAX_PART_HEADER:
        extra = f"the header {others[0][:50]!r}" if others else "long headers"
        raise RequestError(
            422, "metadata", f"{where} has {extra}, which may tell more than its image does; allowed are "
            "Content-Disposition and Content-Type, short ones",
        )  # fmt: skip
    if kind not in PART_TYPES:
        raise RequestError(
            415, "unsupported-type", f"{where} is {kind[:60]!r}, which is not read here; allowed are {PNG} and {NPY}, "
            f"or {ANY}, which may be either",
        )  # fmt: skip
    return kind


async def _aside(function: Callable[[], T], values: int) -> T:
    """Decode so many values: in a thread where that takes longer than a thread costs, since other requests wait."""
    return await asyncio.to_thread(function) if values > DECODED_AT_ONCE else function()
