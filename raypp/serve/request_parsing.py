"""Request bodies: one image or a batch, as PNG or NumPy file, of exactly the served shape.

Headers and lengths are checked before a pixel is decoded. Of a PNG only the image data is decoded; NumPy files are read
as raw bytes, never as pickles.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from typing import TypeVar

import numpy as np
from fastapi import Request
from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from raypp.serve.admission import Limits, RequestError
from raypp.serve.image_parsing import NPY_SIGNATURE, Shape, parse_npy, parse_png, too_many_images
from raypp.serve.schemas import MULTIPART, NPY, PNG
from raypp.utils.errors import first_line
from raypp.utils.images import Pixels
from raypp.utils.registry import suggest

OCTET_STREAM = "application/octet-stream"  # clients send it for files of unknown type
PART_TYPES = ("", OCTET_STREAM, PNG, NPY)
MAX_VALUES_INLINE = 2**15  # PNG values decoded in the event loop: ten images of 32 x 32
MAX_TEXT_FIELDS = 16  # the parser reads so many, to name one in the error
MAX_PART_HEADER = 512  # bytes of the headers of a form's part

T = TypeVar("T")

logging.getLogger("python_multipart").setLevel(logging.ERROR)  # its warnings quote bytes of the body


async def read_body(chunks: AsyncIterator[bytes], length: str | None, limits: Limits) -> bytes:
    """Read a body of which the header Content-Length states the ``length``; raises RequestError (408 or 413)."""
    if length is not None and length.isascii() and length.isdigit() and int(length) > limits.body:
        raise _body_too_large(limits)
    body = bytearray()
    try:
        async with asyncio.timeout(limits.idle) as timeout:  # else slow clients would occupy the replica
            async for chunk in chunks:
                timeout.reschedule(asyncio.get_running_loop().time() + limits.idle)
                body += chunk
                if len(body) > limits.body:
                    raise _body_too_large(limits)
    except TimeoutError as error:
        raise RequestError(408, "too-slow", f"no part of the body arrived for {limits.idle:g} s") from error
    return bytes(body)


def _body_too_large(limits: Limits) -> RequestError:
    return RequestError(413, "body-too-large", f"the body is larger than the {limits.body:,} bytes allowed")


async def read_request_images(
    request: Request, shape: Shape, limits: Limits, plain: Shape | None = None
) -> tuple[Pixels, Pixels | None]:
    """Read the images of a request's body, as :func:`read_images` does, and count them for the observer."""
    body = await read_body(request.stream(), request.headers.get("content-length"), limits)
    images, originals = await read_images(body, request.headers.get("content-type", ""), shape, limits, plain)
    request.state.num_images = len(images)
    return images, originals


async def read_images(
    body: bytes, content_type: str, shape: Shape, limits: Limits, plain: Shape | None = None
) -> tuple[Pixels, Pixels | None]:
    """Read the images of a body; raises RequestError (400, 413, 415 or 422).

    Args:
        shape: (H, W, C) of every image.
        plain: (H, W, C) of the images in the form's field ``plain``; None refuses this field.

    Returns:
        uint8 (N, H, W, C), and as many images of the field ``plain`` if the form has it.
    """
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type == PNG:
        return await _maybe_in_thread(lambda: parse_png(body, "the body", shape)[None], math.prod(shape)), None
    if media_type == NPY:
        return parse_npy(body, "the body", shape, limits), None
    if media_type == MULTIPART:
        shapes = {"image": shape} | ({"plain": plain} if plain is not None else {})
        return await _read_form_images(body, content_type, shapes, limits)
    reason = f"Content-Type {media_type[:60]!r} is not supported here" if media_type else "there is no Content-Type"
    reason += f"; allowed are {PNG}, {NPY} and {MULTIPART} (lossy formats destroy the protected image)"
    raise RequestError(415, "unsupported-type", reason, {"Accept": f"{PNG}, {NPY}, {MULTIPART}"})


async def _read_form_images(
    body: bytes, content_type: str, shapes: dict[str, Shape], limits: Limits
) -> tuple[Pixels, Pixels | None]:
    form = await _parse_form(body, content_type, shapes, limits)
    try:
        files = await _read_files(form, shapes, limits)
    finally:
        await form.close()
    counts = {name: sum(map(_num_images, contents)) for name, contents in files.items()}
    if not counts["image"]:
        raise RequestError(422, "no-image", "the form holds no file in field 'image'")
    if counts.get("plain", 0) not in (0, counts["image"]):
        reason = f"field 'plain' holds {counts['plain']} images, field 'image' {counts['image']}"
        raise RequestError(422, "wrong-number", reason)

    def decode_all() -> dict[str, Pixels]:
        return {name: _decode_files(name, contents, shapes[name]) for name, contents in files.items() if contents}

    num_values = sum(math.prod(shapes[name]) for name in files for file in files[name] if isinstance(file, bytes))
    images = await _maybe_in_thread(decode_all, num_values)
    return images["image"], images.get("plain")


def _num_images(file: Pixels | bytes) -> int:
    return 1 if isinstance(file, bytes) else len(file)


async def _parse_form(body: bytes, content_type: str, fields: Iterable[str], limits: Limits) -> FormData:
    """Parse a form; the caller closes it."""

    async def stream() -> AsyncGenerator[bytes, None]:
        yield body

    boundary = parse_options_header(content_type)[1].get(b"boundary", b"")
    if not boundary:
        reason = f"Content-Type {MULTIPART} names no boundary; let your HTTP library write the header"
        raise RequestError(400, "bad-form", reason)
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
            reason = f"the form has more than {MAX_TEXT_FIELDS} text fields; allowed are files in {_join(fields)}"
            raise RequestError(422, "unknown-field", reason) from error
        raise RequestError(400, "bad-form", f"the form cannot be read: {reason}") from error
    if not body.rstrip(b"\r\n").endswith(b"--" + boundary + b"--"):
        await form.close()
        raise RequestError(400, "bad-form", "the form cannot be read: its end is missing, or data follows it")
    return form


async def _read_files(form: FormData, shapes: dict[str, Shape], limits: Limits) -> dict[str, list[Pixels | bytes]]:
    """Files of each field: NumPy files as arrays, PNG files as bytes, to be decoded once all are counted."""
    files: dict[str, list[Pixels | bytes]] = {name: [] for name in shapes}
    counts = dict.fromkeys(shapes, 0)
    for name, value in form.multi_items():
        if not isinstance(value, UploadFile):
            reason = f"the form has a text field {name[:50]!r}; allowed are files (parts with a filename) in "
            raise RequestError(422, "unknown-field", reason + _join(shapes))
        if name not in files:
            reason = f"the form has a file in field {name[:50]!r}{suggest(name, shapes)}; allowed are files in "
            raise RequestError(422, "unknown-field", reason + _join(shapes))
        where = f"file {len(files[name]) + 1} of field {name!r}"
        media_type = _part_type(value.headers, where)
        data = await value.read()
        is_npy = media_type == NPY or (media_type != PNG and data.startswith(NPY_SIGNATURE))
        file = parse_npy(data, where, shapes[name], limits, counts[name]) if is_npy else data
        files[name].append(file)
        counts[name] += _num_images(file)
        if counts[name] > limits.images:
            raise too_many_images(limits)
    return files


def _decode_files(field: str, files: list[Pixels | bytes], shape: Shape) -> Pixels:
    images = [
        parse_png(file, f"file {number} of field {field!r}", shape)[None] if isinstance(file, bytes) else file
        for number, file in enumerate(files, 1)
    ]
    return np.concatenate(images)


def _part_type(headers: Headers, where: str) -> str:
    """The media type of a form's part, one of ``PART_TYPES``.

    Nested forms are refused, and so are headers that could hold more than the image's name.
    """
    media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type.startswith("multipart/"):
        reason = f"{where} is {media_type[:60]!r}, several parts in one; send each image as a file of the form itself"
        raise RequestError(415, "unsupported-type", reason)
    others = sorted({name.lower() for name in headers.keys()} - {"content-disposition", "content-type"})  # noqa: SIM118
    if others or sum(map(len, headers.values())) > MAX_PART_HEADER:
        extra = f"the header {others[0][:50]!r}" if others else "long headers"
        raise RequestError(
            422, "metadata", f"{where} has {extra}, which may reveal more than its image does; allowed are short "
            "Content-Disposition and Content-Type",
        )  # fmt: skip
    if media_type not in PART_TYPES:
        raise RequestError(
            415, "unsupported-type", f"{where} is {media_type[:60]!r}, which is not supported here; allowed are {PNG} "
            f"and {NPY}, or {OCTET_STREAM} for either",
        )  # fmt: skip
    return media_type


def _join(fields: Iterable[str]) -> str:
    return " and ".join(map(repr, fields))


async def _maybe_in_thread(function: Callable[[], T], num_values: int) -> T:
    """Run a function that decodes ``num_values``; large work runs in a thread, so that other requests continue."""
    return await asyncio.to_thread(function) if num_values > MAX_VALUES_INLINE else function()
