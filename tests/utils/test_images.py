"""Decoding, fitting and writing images: what comes out is what a viewer shows, and what is refused is named."""

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile

from raypp.data.loader import to_float_tensor
from raypp.utils import image_files, images
from raypp.utils.errors import DataError, StorageError


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def attempt(data: bytes) -> np.ndarray | DataError:
    try:
        return images.decode(data, name="photo.x", max_pixels=10_000)
    except DataError as error:
        return error


@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    mode=st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK"]),
    channels=st.sampled_from([1, 3]),
)
def test_every_mode_and_size_decodes_to_the_requested_form(height: int, width: int, mode: str, channels: int) -> None:
    picture = Image.fromarray(noise(height, width)).convert("L" if mode == "I;16" else "RGB").convert(mode)
    data = encoded(picture, "TIFF" if mode == "CMYK" else "PNG")
    pixels = images.decode(data, name="x", channels=channels)
    assert pixels.shape == (height, width, channels)
    assert pixels.dtype == np.uint8
    assert pixels.flags.writeable


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_lossless_formats_give_back_the_pixels(kind: str) -> None:
    pixels = noise(7, 9)
    options = {"lossless": True} if kind == "WEBP" else {}
    assert np.array_equal(images.decode(encoded(Image.fromarray(pixels), kind, **options), name="x"), pixels)


def test_jpeg_gives_what_pillow_gives() -> None:
    data = encoded(Image.fromarray(noise(16, 24)), "JPEG")
    assert np.array_equal(images.decode(data, name="x"), np.asarray(Image.open(io.BytesIO(data))))


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    pixels = images.decode(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), name="x")
    assert (pixels == (255, 0, 0)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    upright = noise(4, 6)
    undo: Callable[[np.ndarray], np.ndarray] = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(np.ascontiguousarray(undo(upright))), exif=exif)
    assert np.array_equal(images.decode(data, name="x"), upright)


def test_transparency_is_laid_on_white() -> None:
    rgba = np.zeros((1, 3, 4), dtype=np.uint8)
    rgba[0, :, 3] = (0, 128, 255)
    pixels = images.decode(encoded(Image.fromarray(rgba)), name="x")
    assert pixels[0, :, 0].tolist() == [255, 127, 0]
    grey_alpha = Image.merge("LA", (Image.new("L", (1, 1), 10), Image.new("L", (1, 1), 0)))
    assert images.decode(encoded(grey_alpha), name="x", channels=1).tolist() == [[[255]]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 0, 0, 0, 0, 200])
    palette.putpixel((1, 0), 1)
    assert images.decode(encoded(palette, transparency=0), name="x").tolist() == [[[255, 255, 255], [0, 0, 200]]]


@pytest.mark.parametrize(("kind", "mode"), [("PNG", "I;16"), ("TIFF", "I;16"), ("TIFF", "I")])
def test_deep_grey_is_scaled_not_clipped(kind: str, mode: str) -> None:
    values = np.array([[0, 128, 129, 257, 32768, 65535]], dtype=np.uint16 if mode == "I;16" else np.int32)
    pixels = images.decode(encoded(Image.fromarray(values), kind), name="x")
    assert pixels[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255]
    assert (pixels[..., 0] == pixels[..., 2]).all()


def test_float_grey_is_taken_as_zero_to_one() -> None:
    values = np.array([[0, 0.5, 1]], dtype=np.float32)
    assert images.decode(encoded(Image.fromarray(values), "TIFF"), name="x")[0, :, 0].tolist() == [0, 128, 255]
    for bad in (2.0, -0.1, np.nan):
        values[0, 0] = bad
        with pytest.raises(DataError, match=r"deep\.tif has grey values .* allowed is 0 to 1"):
            images.decode(encoded(Image.fromarray(values), "TIFF"), name="deep.tif")


def test_cmyk_becomes_rgb() -> None:
    pixels = images.decode(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), name="x")
    assert abs(pixels.astype(int) - (255, 0, 0)).max() < 8


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_every_cut_is_refused_by_name_or_lost_nothing(kind: str) -> None:
    data = encoded(Image.fromarray(noise(12, 12)), kind)
    whole = images.decode(data, name="x")
    results = [attempt(data[:cut]) for cut in range(len(data))]
    refused = [result for result in results if isinstance(result, DataError)]
    assert all(np.array_equal(result, whole) for result in results if not isinstance(result, DataError))
    assert all("photo.x" in str(error) for error in refused)
    assert len(refused) > len(data) * 0.8


@pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")
@given(data=st.data())
def test_damaged_bytes_raise_nothing_but_a_data_error(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM"]))
    damaged = bytearray(encoded(Image.fromarray(noise(6, 6)), kind))
    for place in data.draw(st.lists(st.integers(0, len(damaged) - 1), min_size=1, max_size=8)):
        damaged[place] = data.draw(st.integers(0, 255))
    result = attempt(bytes(damaged))
    if isinstance(result, DataError):
        assert "photo.x" in str(result)
        assert "\n" not in str(result)
    else:
        assert result.ndim == 3


@pytest.mark.parametrize("data", [b"hello", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%!PS-Adobe-3.0 EPSF-3.0"])
def test_what_is_no_image_is_refused(data: bytes) -> None:
    with pytest.raises(DataError, match=r"note\.txt is not an image in one of the formats PNG, "):
        images.decode(data, name="note.txt")


@pytest.mark.parametrize(
    "data",
    [
        b"P6 0 0 255\n",
        b"GIF89a" + bytes(7) + b"," + bytes(9) + b"\x02\x02\x44\x01\x00;",
        b"BM" + bytes(8) + b"\x36\0\0\0" + b"\x28\0\0\0" + bytes(8) + b"\1\0\x18\0" + bytes(24),
    ],
)
def test_no_pixels_are_refused(data: bytes) -> None:
    with pytest.raises(DataError, match=r"nothing is (not an image|a damaged (PPM|GIF|BMP) image)"):
        images.decode(data, name="nothing")


def test_oversized_is_refused_from_the_header(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.new("L", (101, 100)))
    assert images.decode(data, name="x", max_pixels=10_100).shape == (100, 101, 3)

    def never(self: ImageFile.ImageFile) -> None:
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", never)
    with pytest.raises(DataError, match=r"big\.png is 100 x 101 pixels, more than the 10099 pixels allowed"):
        images.decode(data, name="big.png", max_pixels=10_099)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_000, 60_000])
def test_bombs_are_refused(side: int) -> None:
    data = bytearray(b"P6 %d %d 255\n" % (side, side))
    with pytest.raises(DataError, match=r"bomb .*64000000 pixels allowed"):
        images.decode(bytes(data), name="bomb")


@given(
    shape=st.tuples(st.integers(1, 50), st.integers(1, 50), st.sampled_from([1, 3])),
    size=st.tuples(st.integers(1, 50), st.integers(1, 50)),
)
def test_fit_gives_the_size_and_keeps_flat_colour(shape: tuple[int, int, int], size: tuple[int, int]) -> None:
    fitted = images.resize_and_center_crop(np.full(shape, 77, dtype=np.uint8), size)
    assert fitted.shape == (*size, shape[2])
    assert (fitted == 77).all()


def test_fit_crops_the_centre_and_keeps_the_aspect() -> None:
    wide = np.zeros((10, 30, 3), dtype=np.uint8)
    wide[:, 10:20] = 200
    assert (images.resize_and_center_crop(wide, (10, 10)) == 200).all()
    assert (images.resize_and_center_crop(wide.transpose(1, 0, 2), (10, 10)) == 200).all()
    square = noise(10, 10)
    assert images.resize_and_center_crop(square, (10, 10)) is square


def test_fit_is_antialiased() -> None:
    checks = np.indices((64, 64)).sum(axis=0) % 2 * np.uint8(255)
    fitted = images.resize_and_center_crop(checks.astype(np.uint8)[..., None], (8, 8))
    assert abs(fitted.astype(int) - 127).max() <= 2


def test_decode_with_size_is_decode_then_fit() -> None:
    data = encoded(Image.fromarray(noise(40, 60)), "JPEG")
    expected = images.resize_and_center_crop(images.decode(data, name="x"), (16, 16))
    assert np.array_equal(images.decode(data, name="x", size=(16, 16)), expected)


def test_grey_is_the_grey_of_decode() -> None:
    pixels = noise(50, 50)
    assert np.array_equal(images.to_grayscale(pixels), images.decode(images.encode_png(pixels), name="x", channels=1))


@pytest.mark.parametrize("channels", [1, 3])
def test_png_round_trip(tmp_path: Path, channels: int) -> None:
    pixels = noise(5, 8, channels)
    images.write_png(tmp_path / "a.png", pixels)
    assert np.array_equal(images.decode((tmp_path / "a.png").read_bytes(), name="a", channels=channels), pixels)
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


def test_write_png_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"cannot write .*missing/a\.png: No such file or directory"):
        images.write_png(tmp_path / "missing" / "a.png", noise(2, 2))
    (tmp_path / "taken.png").mkdir()
    with pytest.raises(StorageError, match=r"taken\.png"):
        images.write_png(tmp_path / "taken.png", noise(2, 2))
    assert [file.name for file in tmp_path.iterdir()] == ["taken.png"]


def test_tensors_and_back_are_exact() -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    tensor = to_float_tensor(torch.from_numpy(pixels))
    assert tensor.shape == (1, 1, 16, 16)
    assert tensor.dtype == torch.float32
    assert tensor.max() == 1
    assert np.array_equal(images.to_uint8(tensor).permute(0, 2, 3, 1).numpy(), pixels)
    assert torch.equal(images.quantize_8bit(tensor), tensor)


def test_rounding_is_to_the_nearest_after_clamping() -> None:
    values = torch.tensor([-3.0, 0.4 / 255, 0.6 / 255, 254.6 / 255, 7.0]).view(1, 1, 1, 5)
    assert images.to_uint8(values).flatten().tolist() == [0, 0, 1, 255, 255]
    assert torch.equal(images.quantize_8bit(values).flatten(), torch.tensor([0, 0, 1, 255, 255]) / 255)


def test_grid_shows_every_pixel() -> None:
    rows = [noise(4, 5)[None].repeat(3, axis=0), noise(4, 5, 1)[None]]
    picture = images.make_grid(rows, labels=["a", "longer"], scale=2)
    assert picture.ndim == 3
    assert picture.shape[2] == 3
    left = picture.shape[1] - 3 * (10 + 4)
    assert np.array_equal(picture[4:12, left : left + 10], rows[0][0].repeat(2, axis=0).repeat(2, axis=1))
    assert np.array_equal(picture[16:24:2, left : left + 10 : 2, :1], rows[1][0])
    assert (picture[:4] == 255).all()
    assert (picture[16:24, :left] < 100).any(), "the label cannot be read"


def test_find_images(tmp_path: Path) -> None:
    for name in ("b/2.JPG", "b/1.png", "a.webp", "b/readme.txt", ".hidden/x.png", "b/._1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    paths = image_files.find_images(tmp_path)
    assert [file.relative_to(tmp_path).as_posix() for file in paths] == ["a.webp", "b/1.png", "b/2.JPG"]
    assert image_files.find_images(tmp_path / "a.webp") == [tmp_path / "a.webp"]
    with pytest.raises(DataError, match=r"\.hidden/empty does not exist"):
        image_files.find_images(tmp_path / ".hidden" / "empty")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty holds no image"):
        image_files.find_images(tmp_path / "empty")


# What a file says about itself


def chunk(kind: bytes, content: bytes, checksum_error: int = 0) -> bytes:
    checksum = zlib.crc32(kind + content) ^ checksum_error
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def png(
    width: int,
    height: int,
    bits: int,
    color: int,
    rows: bytes,
    *,
    before: bytes = b"",
    cut: int = 0,
    interlaced: int = 0,
    end: bool = True,
) -> bytes:
    """A PNG file of unfiltered ``rows``, the last ``cut`` bytes of whose packed data are missing."""
    packed = zlib.compress(rows)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, interlaced))
    data = chunk(b"IDAT", packed[: len(packed) - cut])
    return b"\x89PNG\r\n\x1a\n" + header + before + data + (chunk(b"IEND", b"") if end else b"")


def rows_of(samples: np.ndarray) -> bytes:
    return b"".join(b"\0" + row.tobytes() for row in samples)


def flip_bit(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def exif(*entries: tuple[int, int, int, bytes], extra: bytes = b"") -> bytes:
    """A little-endian EXIF block of (tag, type, count, four bytes), ``extra`` behind them."""
    packed = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + packed + bytes(4) + extra


def with_segment(jpeg: bytes, marker: int, content: bytes) -> bytes:
    return jpeg[:2] + b"\xff" + bytes([marker]) + struct.pack(">H", len(content) + 2) + content + jpeg[2:]


TURNED = (0x112, 3, 1, struct.pack("<HH", 6, 0))


@pytest.mark.parametrize("interlaced", [False, True])
def test_png_with_a_wrong_checksum_is_damaged_where_it_decides_on_the_picture(interlaced: bool) -> None:
    pixels = noise(16, 16)
    rows = passes_of(pixels) if interlaced else rows_of(pixels)
    text = chunk(b"tEXt", b"a\0hello", checksum_error=1)
    whole = png(16, 16, 8, 2, rows, interlaced=int(interlaced))
    assert np.array_equal(images.decode(whole, name="x"), pixels)
    assert np.array_equal(
        images.decode(png(16, 16, 8, 2, rows, before=text, interlaced=int(interlaced)), name="x"), pixels
    )
    assert np.array_equal(images.decode(whole + b"bytes behind the image", name="x"), pixels)
    checksum_at = len(whole) - 12 - 4
    for damaged in (flip_bit(whole, checksum_at), flip_bit(whole, 29), flip_bit(whole, 60), flip_bit(whole, -1)):
        with pytest.raises(DataError, match=r"x is a damaged PNG image: the checksum of its chunk 'I(HDR|DAT|END)'"):
            images.decode(damaged, name="x")
    half = len(whole) // 2
    with pytest.raises(DataError, match="x is a damaged PNG image"):
        images.decode(whole[:half] + bytes(len(whole) - half), name="x")


def test_png_without_an_end_is_damaged() -> None:
    pixels = noise(8, 8)
    with pytest.raises(DataError, match="damaged PNG image: it ends before its last chunk"):
        images.decode(png(8, 8, 8, 2, rows_of(pixels), end=False), name="x")
    doubled = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 8, 2, 0, 0, 0))
    with pytest.raises(DataError, match=r"damaged PNG image: it has a chunk 'IHDR' that is not known"):
        images.decode(png(8, 8, 8, 2, rows_of(pixels), before=doubled), name="x")


@pytest.mark.parametrize("side", [4, 32, 300])
@pytest.mark.parametrize("cut", range(1, 9))
def test_png_whose_packed_data_ends_early_is_damaged(side: int, cut: int) -> None:
    """All pixels are there; what is missing is the checksum of the data, the end of the stream, or both."""
    with pytest.raises(DataError, match="x is a damaged PNG image"):
        images.decode(png(side, side, 8, 2, rows_of(noise(side, side)), cut=cut), name="x")


def passes_of(samples: np.ndarray) -> bytes:
    """The rows of an interlaced PNG: seven passes of the pixels."""
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    parts = (samples[y::dy, x::dx] for x, y, dx, dy in passes)
    return b"".join(rows_of(part) for part in parts if part.size)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 2), (9, 7), (64, 8)])
@pytest.mark.parametrize("interlaced", [False, True])
def test_png_whose_sound_data_hold_too_few_pixels_is_damaged(height: int, width: int, interlaced: bool) -> None:
    """Pillow gives black pixels for those that lack."""
    pixels = noise(height, width)
    rows = passes_of(pixels) if interlaced else rows_of(pixels)
    whole = png(width, height, 8, 2, rows, interlaced=int(interlaced))
    assert np.array_equal(images.decode(whole, name="x"), pixels)
    for short in (rows[: len(rows) // 2], rows[:-1], b""):
        with pytest.raises(DataError, match=r"^x is a damaged PNG image: its image data ends early$"):
            images.decode(png(width, height, 8, 2, short, interlaced=int(interlaced)), name="x")


@pytest.mark.parametrize(("color", "channels"), [(0, 1), (2, 3), (3, 1), (4, 2), (6, 4)])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("interlaced", [0, 1])
def test_a_png_of_any_depth_may_hold_its_pixels_and_no_fewer(
    color: int, channels: int, bits: int, interlaced: int
) -> None:
    if bits not in {0: (1, 2, 4, 8, 16), 3: (1, 2, 4, 8)}.get(color, (8, 16)):
        return
    palette = chunk(b"PLTE", bytes(3 * 2**bits)) if color == 3 else b""
    width = height = 11
    parts = [(2, 2), (2, 1), (1, 3), (3, 3), (3, 6), (6, 5), (5, 11)] if interlaced else [(11, 11)]  # rows, columns
    num = sum(rows * (1 + -(-columns * bits * channels // 8)) for rows, columns in parts)
    whole = png(width, height, bits, color, bytes(num), before=palette, interlaced=interlaced)
    assert images.decode(whole, name="x").shape == (height, width, 3)
    with pytest.raises(DataError, match="damaged PNG image: its image data ends early"):
        images.decode(png(width, height, bits, color, bytes(num - 1), before=palette, interlaced=interlaced), name="x")


@pytest.mark.parametrize("colors", [None, 0, 257])
def test_a_png_without_a_palette_of_its_colors_is_damaged(colors: int | None) -> None:
    palette = b"" if colors is None else chunk(b"PLTE", bytes(3 * colors))
    with pytest.raises(DataError, match=r"^x is a damaged PNG image: it(s palette has \d+ bytes,| has no palette) "):
        images.decode(png(4, 4, 8, 3, rows_of(noise(4, 4, 1)), before=palette), name="x")


def test_png_data_behind_the_pixels_is_passed_over() -> None:
    pixels = noise(8, 8)
    assert np.array_equal(images.decode(png(8, 8, 8, 2, rows_of(pixels) + bytes(40)), name="x"), pixels)


def test_metadata_that_cannot_be_read_does_not_matter() -> None:
    pixels = noise(8, 8)
    profile = chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(3_000_000)))
    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(b"x" * 5_000_000))
    for before in (profile, text, chunk(b"eXIf", b"II*\0\xff\xff\xff\xff"), chunk(b"gAMA", b""), chunk(b"pHYs", b"1")):
        assert np.array_equal(images.decode(png(8, 8, 8, 2, rows_of(pixels), before=before), name="x"), pixels)
    jpeg = encoded(Image.fromarray(pixels), "JPEG")
    expected = images.decode(jpeg, name="x")
    for marker, content in (
        (0xE1, b"Exif\0\0" + b"rubbish"),
        (0xE2, b"MPF\0" + b"II*\0" + bytes(4)),
        (0xE2, b"ICC_PROFILE\0\x01\x02" + bytes(5)),
        (0xED, b"Photoshop 3.0\x008BIM\x04"),
        (0xE0, b"JFIF\0"),
        (0xFE, b"\xff\xd9 a comment that holds an end marker"),
    ):
        assert np.array_equal(images.decode(with_segment(jpeg, marker, content), name="x"), expected), content


def test_orientation_is_read_with_metadata_that_cannot_be_read() -> None:
    pixels = noise(8, 6)
    rotated = np.rot90(pixels, -1)
    odd = exif(TURNED, (0x11A, 10, 1, struct.pack("<I", 38)), extra=struct.pack("<ii", -1, 0))
    far = exif((0x10F, 2, 500, struct.pack("<I", 60_000)), TURNED)
    xmp = b'<x tiff:Orientation="6"/>'
    for block in (odd, far):
        jpeg = with_segment(encoded(Image.fromarray(pixels), "JPEG"), 0xE1, b"Exif\0\0" + block)
        assert images.decode(jpeg, name="x").shape == (6, 8, 3)
        assert np.array_equal(
            images.decode(png(6, 8, 8, 2, rows_of(pixels), before=chunk(b"eXIf", block)), name="x"), rotated
        )
        webp = encoded(Image.fromarray(pixels), "WEBP", lossless=True, exif=b"Exif\0\0" + block)
        assert np.array_equal(images.decode(webp, name="x"), rotated)
    raw = b"\nexif\n" + b"%8d\n" % len(odd) + odd.hex().encode()
    for before in (
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp),
        chunk(b"tEXt", b"Raw profile type exif\0" + raw),
        chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(raw)),
    ):
        assert np.array_equal(images.decode(png(6, 8, 8, 2, rows_of(pixels), before=before), name="x"), rotated)
    jpeg = with_segment(encoded(Image.fromarray(pixels), "JPEG"), 0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp)
    assert images.decode(jpeg, name="x").shape == (6, 8, 3)
    wrong = exif((0x112, 3, 1, struct.pack("<HH", 9, 0)))
    assert np.array_equal(
        images.decode(png(6, 8, 8, 2, rows_of(pixels), before=chunk(b"eXIf", wrong)), name="x"), pixels
    )


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 1}])
def test_jpeg_without_its_end_marker_is_damaged(options: dict[str, object]) -> None:
    data = encoded(Image.fromarray(noise(48, 48)), "JPEG", **options)
    whole = images.decode(data, name="x")
    assert np.array_equal(images.decode(data + b"a second picture \xff\xd8\xff", name="x"), whole)
    half = len(data) // 2
    for damaged in (data[:-2], data[:-1], data[:half], data[:half] + bytes(half)):
        with pytest.raises(DataError, match="x is a damaged JPEG image: it has no end marker"):
            images.decode(damaged, name="x")


def test_jpeg_that_lacks_a_part_between_restart_markers_is_damaged() -> None:
    data = encoded(Image.fromarray(noise(64, 64)), "JPEG", restart_marker_blocks=1)
    begin, end = data.index(b"\xff\xd2"), data.index(b"\xff\xd4")
    with pytest.raises(DataError, match="x is a damaged JPEG image: a part of its image data is missing"):
        images.decode(data[:begin] + data[end:], name="x")


def test_an_adobe_segment_that_is_too_short_does_not_matter() -> None:
    jpeg = encoded(Image.fromarray(noise(16, 16)), "JPEG")
    jpeg = jpeg[:2] + jpeg[20:]  # without JFIF's segment, which decides alone
    for content in (b"Adobe\0", b"Adobe\0d\0\0\0\0"):
        assert np.array_equal(images.decode(with_segment(jpeg, 0xEE, content), name="x"), images.decode(jpeg, name="x"))
    assert not np.array_equal(  # a whole one counts: it says that the colors are RGB
        images.decode(with_segment(jpeg, 0xEE, b"Adobe\0d\0\0\0\0\0"), name="x"), images.decode(jpeg, name="x")
    )


def test_first_picture_of_a_camera_file_of_several() -> None:
    pictures = [Image.fromarray(noise(16, 16, seed=seed)) for seed in (0, 1)]
    data = encoded(pictures[0], "MPO", save_all=True, append_images=pictures[1:])
    first = Image.open(io.BytesIO(data)).convert("RGB")
    assert np.array_equal(images.decode(data, name="x"), np.asarray(first))
    animated = encoded(pictures[0], "PNG", save_all=True, append_images=pictures[1:])
    assert np.array_equal(images.decode(animated, name="x"), noise(16, 16))


def test_gif_without_its_end_marker_is_damaged() -> None:
    frames = [Image.fromarray(noise(8, 8, seed=seed)) for seed in (0, 1)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    whole = images.decode(data, name="x")
    assert np.array_equal(images.decode(data + b"more", name="x"), whole)
    for damaged in (data[:-1], data[: len(data) * 3 // 4], data[:-20] + bytes(20)):
        with pytest.raises(DataError, match="x is a damaged GIF image: it has no end marker"):
            images.decode(damaged, name="x")


def test_webp_shorter_than_it_says_is_damaged() -> None:
    data = encoded(Image.fromarray(noise(8, 8)), "WEBP", exif=exif(TURNED))
    with pytest.raises(DataError, match="x is a damaged WEBP image: it is shorter than its header says"):
        images.decode(data[:-1], name="x")


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_a_grey_level_declared_transparent_is_white(bits: int) -> None:
    top = 2**bits - 1
    levels = np.arange(2 ** min(bits, 4)) * (257 if bits == 16 else 1)
    if bits == 16:
        levels[5] = levels[4] + 1  # the same eight bits
    kind = ">u2" if bits == 16 else "u1"
    packed = levels.astype(kind) if bits >= 8 else np.packbits((levels[:, None] >> np.arange(bits)[::-1]) & 1)
    hidden = 4 if bits > 2 else 1
    transparency = chunk(b"tRNS", struct.pack(">H", levels[hidden]))
    data = png(len(levels), 1, bits, 0, rows_of(packed[None]), before=transparency)
    expected = np.rint(levels * (255 / top)).astype(int)
    expected[hidden] = 255
    for channels in (1, 3):
        assert images.decode(data, name="x", channels=channels)[0, :, 0].tolist() == expected.tolist()


@pytest.mark.parametrize("bits", [8, 16])
def test_a_color_declared_transparent_is_white(bits: int) -> None:
    kind, scale = (">u2", 257) if bits == 16 else ("u1", 1)
    colors = np.array([[9, 8, 7], [9, 8, 6], [1, 2, 3]], dtype=np.int64) * scale
    if bits == 16:
        colors[1] = colors[0] + (0, 0, 1)  # the same eight bits
    transparency = chunk(b"tRNS", struct.pack(">3H", *colors[0]))
    data = png(3, 1, bits, 2, rows_of(colors.astype(kind).reshape(1, -1)), before=transparency)
    second = [9, 8, 7 if bits == 16 else 6]
    assert images.decode(data, name="x").tolist() == [[[255, 255, 255], second, [1, 2, 3]]]


def test_a_format_that_cannot_be_read_is_called_damaged_and_not_unknown() -> None:
    with pytest.raises(DataError, match=r"photo\.png is a damaged PNG image: "):
        images.decode(b"\x89PNG\r\n\x1a\n" + bytes(40), name="photo.png")
    with pytest.raises(DataError, match=r"photo\.jpg is a damaged JPEG image: "):
        images.decode(b"\xff\xd8\xff\xe0" + bytes(40), name="photo.jpg")


def test_files_are_images_by_suffix_or_by_content(tmp_path: Path) -> None:
    data, jpeg = encoded(Image.fromarray(noise(4, 4))), encoded(Image.fromarray(noise(4, 4)), "JPEG")
    names = ("a.jpe", "b", "c.png.1", "d.jpg?w=300", "e.PNG", "f.jpg (1)", "g.bak", "h.apng", "i.png.part")
    for name in names:
        (tmp_path / name).write_bytes(jpeg if "j" in name else data)
    for name in ("Thumbs.db", ".DS_Store", "readme", "labels.csv", "x.png.json", "notes.txt"):
        (tmp_path / name).write_bytes(b"some text")
    for folder in ("__MACOSX", "@eaDir", ".cache"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "z.png").write_bytes(data)
    (tmp_path / "z.png.2").write_bytes(b"<html>an error page</html>")
    paths = [file.name for file in image_files.find_images(tmp_path)]
    assert paths == sorted([*names, "z.png.2"])


def test_an_empty_file_without_a_suffix_is_an_image_where_images_have_none(tmp_path: Path) -> None:
    for name in ("a/IMG_0001", "b/c.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(encoded(Image.fromarray(noise(4, 4))))
    for name in ("a/IMG_0002", "a/log.txt", "b/placeholder"):
        (tmp_path / name).touch()
    paths = [file.relative_to(tmp_path).as_posix() for file in image_files.find_images(tmp_path)]
    assert paths == ["a/IMG_0001", "a/IMG_0002", "b/c.png"]


UNREAD_STARTS = {
    "heic": b"\0\0\0\x18ftypheic",
    "avif": b"\0\0\0\x1cftypavif",
    "jxl": b"\0\0\0\x0cJXL \r\n\x87\n",
    "naked jxl": b"\xff\x0a\xfa\x7f",
    "naked jpeg 2000": b"\xff\x4f\xff\x51\0\x2f",
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "svg with a declaration": b"\xef\xbb\xbf<?xml version='1.0'?>\n<!-- a drawing -->\n<svg width='1'>",
    "svg with a document type": b"<?xml version='1.0'?><!DOCTYPE svg PUBLIC '-' [ <!ENTITY a 'b'> ]>",
    "fits": b"SIMPLE  =                    T",
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0",
    "npy": b"\x93NUMPY\1\0",
    "qoi": b"qoif\0\0\0\1",
    "pfm": b"PF\n1 1\n-1.0\n",
    "dicom": bytes(128) + b"DICM",
    "exr": b"\x76\x2f\x31\x01",
}


@pytest.mark.parametrize("start", UNREAD_STARTS.values(), ids=UNREAD_STARTS)
def test_an_image_that_is_not_read_here_is_refused_without_a_suffix_too(tmp_path: Path, start: bytes) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    (tmp_path / "IMG_0001").write_bytes(start + bytes(40))
    with pytest.raises(DataError, match="IMG_0001 is an image in a format that is not supported"):
        image_files.find_images(tmp_path)


@pytest.mark.parametrize("suffix", [".qoi", ".pfm", ".EPS", ".jpc", ".dcm", ".npy", ".fits", ".svgz", ".heif"])
def test_an_image_that_is_not_read_here_is_refused_by_its_suffix(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    (tmp_path / f"b{suffix}").write_bytes(b"")
    with pytest.raises(DataError, match=f"b{suffix} is an image in a format that is not supported"):
        image_files.find_images(tmp_path)


def test_a_page_with_a_drawing_in_it_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    (tmp_path / "index.html").write_bytes(b"<!DOCTYPE html><html><body><svg width='1'></svg></body></html>")
    assert [file.name for file in image_files.find_images(tmp_path)] == ["a.png"]


def test_links_are_followed_once_and_loops_are_not(tmp_path: Path) -> None:
    for name in ("set/a/1.png", "set/a/deep/2.png", "elsewhere/3.png", "elsewhere/more/4.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    a = tmp_path / "set" / "a"
    (a / "linked").symlink_to(tmp_path / "elsewhere")
    (a / "up").symlink_to("..")
    (a / "self").symlink_to(".")
    (a / "deep" / "top").symlink_to(tmp_path)
    (tmp_path / "elsewhere" / "back").symlink_to(a)
    paths = [file.relative_to(a).as_posix() for file in image_files.find_images(a)]
    assert paths == ["1.png", "deep/2.png", "linked/3.png", "linked/more/4.png"]
    (a / "gone").symlink_to(tmp_path / "unmounted")
    with pytest.raises(DataError, match="gone is a link to a file or folder that does not exist"):
        image_files.find_images(a)


def test_names_that_no_terminal_takes_are_escaped() -> None:
    assert images.printable(os.fsdecode(b"caf\xe9\n\x1b[1m.png")) == r"caf\xe9\n\x1b[1m.png"
    assert images.printable("café 猫.png") == "café 猫.png"


@pytest.mark.parametrize("compression", ["tiff_adobe_deflate", "tiff_deflate"])
def test_a_tiff_whose_packed_pixels_are_damaged_is_refused(compression: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 30, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "TIFF", compression=compression)
    data = file.getvalue()
    assert (images.decode(data, name="a.tif") == pixels).all()
    third = len(data) // 3
    with pytest.raises(DataError, match=r"a\.tif is a damaged TIFF image"):
        images.decode(data[:third] + bytes(third) + data[2 * third :], name="a.tif")


def test_an_empty_file_and_an_ascii_ppm() -> None:
    with pytest.raises(DataError, match=r"^a is empty$"):
        images.decode(b"", name="a")
    assert images.decode(b"P3\n1 1\n255\n1 2 3\n", name="a").tolist() == [[[1, 2, 3]]]


def test_names_of_all_languages_stay_and_what_writes_over_a_terminal_is_escaped() -> None:
    for name in ("می\u200cخواهم", "New\u00a0York", "a\u3000b", "👨\u200d👩", "été"):
        assert images.printable(name) == name
    assert images.printable("a\nb\x1b[2J\u202ec") == "a\\nb\\x1b[2J\\u202ec"
