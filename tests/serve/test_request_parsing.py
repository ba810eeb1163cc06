"""What a request's body may be; everything else is refused before it is decoded."""

from __future__ import annotations

import asyncio
import io
import struct
import zlib
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from raypp.serve.admission import Limits, RequestError
from raypp.serve.request_parsing import MULTIPART, NPY, PNG, read_body, read_images
from raypp.utils.images import Pixels, encode_png

SHAPE = (16, 12, 3)
LIMITS = Limits(body=100_000, images=4)


def batch(num: int, seed: int = 0, shape: tuple[int, int, int] = SHAPE) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (num, *shape), dtype=np.uint8)


def npy(values: np.ndarray, **options: bool) -> bytes:
    file = io.BytesIO()
    np.save(file, values, **options)  # type: ignore[arg-type]
    return file.getvalue()


def read(
    body: bytes, kind: str, shape: tuple[int, int, int] = SHAPE, plain: tuple[int, int, int] | None = None
) -> tuple[Pixels, Pixels | None]:
    return asyncio.run(read_images(body, kind, shape, LIMITS, plain))


def test_other_requests_go_on_while_large_images_are_decoded() -> None:
    images = batch(2, shape=(160, 140, 3))
    files = "".join(f"--x\r\nContent-Disposition: form-data; name=image; filename={i}\r\n\r\n{{}}\r\n" for i in "ab")
    parts = [part.encode() for part in f"{files}--x--\r\n".split("{}")]
    form = parts[0] + encode_png(images[0]) + parts[1] + encode_png(images[1]) + parts[2]
    sent = [(encode_png(images[0]), PNG, images[:1]), (form, f"{MULTIPART}; boundary=x", images)]

    async def reading(body: bytes, kind: str) -> tuple[Pixels, int]:
        turns = 0

        async def other() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        task = asyncio.create_task(other())
        limits = Limits(images=4)
        decoded, _ = await read_images(body, kind, (160, 140, 3), limits)
        task.cancel()
        return decoded, turns

    for body, kind, expected in sent:
        decoded, turns = asyncio.run(reading(body, kind))
        np.testing.assert_array_equal(decoded, expected)
        assert turns > 0


def refused(body: bytes, kind: str, plain: tuple[int, int, int] | None = None) -> tuple[int, str]:
    with pytest.raises(RequestError) as raised:
        read(body, kind, plain=plain)
    assert "\n" not in str(raised.value)
    return raised.value.status, raised.value.code


def form(*files: tuple[str, bytes]) -> tuple[bytes, str]:
    parts = [
        f'--edge\r\nContent-Disposition: form-data; name="{name}"; filename="x"\r\n\r\n'.encode() + data + b"\r\n"
        for name, data in files
    ]
    return b"".join(parts) + b"--edge--\r\n", f"{MULTIPART}; boundary=edge"


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_a_file_is_what_its_first_header_says() -> None:
    """Decoders go by a PNG file's last header and by what a number can be turned into: neither gets past the check."""
    whole, inside = encode_png(batch(1)[0]), encode_png(batch(1, shape=(12, 16, 3))[0])
    assert refused(whole[:33] + inside[8:], PNG) == (422, "damaged-image")
    many = whole[:33] + chunk(b"IDAT", b"") * 1000 + whole[33:]
    assert refused(many, PNG) == (422, "damaged-image")
    for dims in ("(1e999, 16, 12, 3)", "(1.9, 16, 12, 3)", "(True, 16, 12, 3)"):
        header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {dims}}}".encode()
        body = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(16 * 12 * 3)
        assert refused(body, NPY) == (422, "not-npy")


def test_every_allowed_form_gives_the_same_images() -> None:
    images = batch(3)
    assert np.array_equal(read(npy(images), NPY)[0], images)
    assert np.array_equal(read(npy(images[0]), NPY)[0], images[:1])
    assert np.array_equal(read(encode_png(images[0]), "image/PNG; charset=x")[0], images[:1])
    body, kind = form(("image", encode_png(images[0])), ("image", npy(images[1:])), ("plain", npy(images)))
    decoded, plain = read(body, kind, plain=SHAPE)
    assert np.array_equal(decoded, images)
    assert plain is not None
    assert np.array_equal(plain, images)
    grey = batch(1, shape=(16, 12, 1))
    assert np.array_equal(read(encode_png(grey[0]), PNG, (16, 12, 1))[0], grey)


def test_how_to_show_a_png_is_passed_over_and_metadata_refused() -> None:
    """An EXIF block can hold a thumbnail of the original, and any other chunk a file of another kind."""
    image = batch(1)[0]
    about = PngImagePlugin.PngInfo()
    about.add(b"gAMA", struct.pack(">I", 45455))

    def saved(**options: Any) -> bytes:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG", **options)
        return file.getvalue()

    assert np.array_equal(read(saved(pnginfo=about, dpi=(72, 72)), PNG)[0][0], image)
    about.add_text("secret", "x" * 50_000, zip=True)
    exif = Image.Exif()
    exif[0x010E] = "a boat"
    for options in ({"pnginfo": about}, {"exif": exif}, {"icc_profile": b"x" * 200}):
        assert refused(saved(**options), PNG) == (422, "metadata")


def test_what_may_be_passed_over_cannot_hold_another_image() -> None:
    """Many small chunks, a NumPy header's other keys and comments, and headers of a form's parts would."""
    small = chunk(b"pHYs", b"123456789")
    assert read(IMAGE[:33] + small + IMAGE[33:], PNG)[0].shape == (1, *SHAPE)
    for more in (small + small, chunk(b"pHYs", b"1234567890"), chunk(b"sRGB", b"12")):
        assert refused(IMAGE[:33] + more + IMAGE[33:], PNG) == (422, "metadata")
    whole = npy(batch(1))
    header = whole[10:128].rstrip()
    for other in (header[:-1] + b"'thumb': 'x'}", header + b" # x"):
        assert refused(whole[:10] + other.ljust(117) + b"\n" + whole[128:], NPY) == (422, "not-npy")
    assert read(whole[:10] + header.ljust(117) + b"\n" + whole[128:], NPY)[0].shape == (1, *SHAPE)
    body, kind = form(("image", IMAGE))
    end = b'filename="x"\r\n'
    assert read(body.replace(end, end + b"Content-Type: image/png\r\n"), kind)[0].shape == (1, *SHAPE)
    for more in (b"X-Plain: x\r\n", b"Content-Type: image/png; x=" + b"x" * 600 + b"\r\n"):
        assert refused(body.replace(end, end + more), kind) == (422, "metadata")


@pytest.mark.slow
def test_a_png_holds_its_image_and_nothing_more() -> None:
    head, rows = IMAGE[:33], b"".join(b"\0" + bytes(SHAPE[1] * SHAPE[2]) for _ in range(SHAPE[0]))
    end = chunk(b"IEND", b"")

    def png(packed: bytes, end: bytes = end) -> bytes:
        return head + chunk(b"IDAT", packed) + end

    whole = zlib.compress(rows)
    assert not read(png(whole), PNG)[0].any()
    for packed in (zlib.compress(rows + bytes(64 * 2**20)), whole + b"PK\x03\x04", whole[:-1], zlib.compress(rows[1:])):
        assert refused(png(packed), PNG) == (422, "damaged-image")
    assert refused(png(whole, chunk(b"IEND", b"PK\x03\x04")), PNG) == (422, "trailing-bytes")
    interlaced = chunk(b"IHDR", IMAGE[16:28] + b"\1")
    assert refused(IMAGE[:8] + interlaced + IMAGE[33:], PNG) == (422, "not-png")


def test_images_are_counted_before_one_is_decoded() -> None:
    damaged = IMAGE[:-20]
    assert refused(*form(*[("image", damaged)] * 5)) == (413, "too-many-images")
    body, kind = form(("image", IMAGE))
    assert refused(body + b"PK\x03\x04 and a zip", kind) == (400, "bad-form")


def test_a_form_of_too_many_images_names_the_whole_limit() -> None:
    """Not what is left of it after the files before."""
    for files in ([3, 2], [1, 1, 1, 2], [4, 1]):
        body, kind = form(*(("image", npy(batch(num))) for num in files))
        with pytest.raises(RequestError) as refusal:
            read(body, kind)
        assert (refusal.value.status, refusal.value.code) == (413, "too-many-images")
        assert "more than the 4 images allowed" in str(refusal.value)
    assert len(read(*form(("image", npy(batch(3))), ("image", IMAGE)))[0]) == 4


def test_a_plain_image_is_read_only_if_the_route_allows_it() -> None:
    with_plain = form(("image", IMAGE), ("plain", IMAGE))
    assert refused(*with_plain) == (422, "unknown-field")
    small = batch(1, shape=(8, 6, 3))
    decoded, plain = read(*form(("image", IMAGE), ("plain", npy(small))), plain=(8, 6, 3))
    assert len(decoded) == 1
    assert plain is not None
    assert np.array_equal(plain, small)
    assert refused(*with_plain, plain=(8, 6, 3)) == (422, "wrong-shape")
    assert refused(*form(("image", IMAGE), ("plain", npy(batch(2)))), plain=SHAPE) == (422, "wrong-number")


IMAGE = encode_png(batch(1)[0])
BOMB = (
    b"\x89PNG\r\n\x1a\n"
    + chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    + chunk(b"IDAT", zlib.compress(b"\0" * 10_000_000))
    + chunk(b"IEND", b"")
)


@pytest.mark.parametrize(
    ("body", "kind", "status", "code"),
    [
        (IMAGE, "image/jpeg", 415, "unsupported-type"),
        (IMAGE, "", 415, "unsupported-type"),
        (b"", PNG, 422, "not-png"),
        (IMAGE[:-20], PNG, 422, "damaged-image"),
        (IMAGE[:40] + b"\xff" + IMAGE[41:], PNG, 422, "damaged-image"),
        (IMAGE + b"PK\x03\x04 and a zip", PNG, 422, "trailing-bytes"),
        (BOMB, PNG, 422, "wrong-shape"),
        (encode_png(batch(1, shape=(12, 16, 3))[0]), PNG, 422, "wrong-shape"),
        (encode_png(batch(1, shape=(16, 12, 1))[0]), PNG, 422, "wrong-shape"),
        (b"GIF89a" + IMAGE, PNG, 422, "not-png"),
        (b"", NPY, 422, "not-npy"),
        (npy(batch(2))[:-1], NPY, 422, "damaged-image"),
        (npy(batch(2)) + b"x", NPY, 422, "damaged-image"),
        (npy(batch(5)), NPY, 413, "too-many-images"),
        (npy(batch(2)[:0]), NPY, 422, "wrong-shape"),
        (npy(np.full((1, *SHAPE), np.nan)), NPY, 422, "wrong-type"),
        (npy(np.asfortranarray(batch(2))), NPY, 422, "wrong-type"),
        (npy(np.array([{"a": 1}], dtype=object), allow_pickle=True), NPY, 422, "wrong-type"),
        (npy(batch(2)).replace(b"(2, 16", b"(-2,16"), NPY, 422, "wrong-shape"),
        (npy(batch(2)).replace(b"'descr'", b"__imp__"), NPY, 422, "not-npy"),
        (npy(batch(2)).replace(b", }" + 15 * b" ", b", 'descr': '|u1' }"), NPY, 422, "not-npy"),
        (b"\x93NUMPY\x01\x00\xff\xff" + b"[" * 2000, NPY, 422, "not-npy"),
        (b"nonsense", f"{MULTIPART}; boundary=edge", 400, "bad-form"),
        (b"nonsense", MULTIPART, 400, "bad-form"),
        (*form(("other", IMAGE)), 422, "unknown-field"),
        (*form(), 422, "no-image"),
        (*form(*[("image", IMAGE)] * 5), 413, "too-many-images"),
        (*form(("image", npy(batch(3))), ("image", npy(batch(3)))), 413, "too-many-images"),
        (*form(("image", b"\xff\xd8\xff\xe0 jpeg")), 422, "not-png"),
    ],
)  # fmt: skip
def test_refusals(body: bytes, kind: str, status: int, code: str) -> None:
    assert refused(body, kind) == (status, code)


def test_a_body_is_refused_when_it_is_known_to_be_too_large() -> None:
    chunks_read: list[int] = []

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(100):
            chunks_read.append(1)
            yield b"x" * 10_000

    for length, most in (("200000", 0), (None, 11), ("nonsense", 11), ("5", 11)):
        chunks_read.clear()
        with pytest.raises(RequestError) as raised:
            asyncio.run(read_body(chunks(), length, LIMITS))
        assert raised.value.status == 413
        assert len(chunks_read) <= most


def test_a_stalled_body_times_out() -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield b"x"
        await asyncio.sleep(30)

    with pytest.raises(RequestError, match=r"no part of the body arrived for 0\.05 s") as raised:
        asyncio.run(read_body(chunks(), "5", Limits(idle=0.05)))
    assert raised.value.status == 408


@given(st.data())
def test_mutated_bodies_are_read_or_refused(data: st.DataObject) -> None:
    """Nothing but a refusal ever comes of a damaged body."""
    good = data.draw(st.sampled_from([(IMAGE, PNG), (npy(batch(2)), NPY), form(("image", IMAGE), ("plain", IMAGE))]))
    body = bytearray(good[0])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(body) - 1))
        match data.draw(st.sampled_from("xic")):
            case "x":
                body[at] = data.draw(st.integers(0, 255))
            case "i":
                body[at:at] = data.draw(st.binary(max_size=20))
            case "c":
                del body[at : at + data.draw(st.integers(1, 50))]
        if not body:
            return
    try:
        decoded, _ = read(bytes(body), good[1])
    except RequestError:
        return
    else:
        assert decoded.shape[1:] == SHAPE
        assert decoded.dtype == np.uint8
