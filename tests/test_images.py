"""Decoding, fitting and writing images: what comes out is what a viewer shows, and what is refused is named."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from raypp import images
from raypp.data.loader import as_input
from raypp.errors import DataError, StorageError


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
@settings(max_examples=60, deadline=None)
def test_every_mode_and_size_decodes_to_the_asked_form(height: int, width: int, mode: str, channels: int) -> None:
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
@settings(max_examples=150, deadline=None)
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


@pytest.mark.parametrize(
    "data", [b"", b"hello", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%!PS-Adobe-3.0 EPSF-3.0"]
)
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
@settings(max_examples=60, deadline=None)
def test_fit_gives_the_size_and_keeps_flat_colour(shape: tuple[int, int, int], size: tuple[int, int]) -> None:
    fitted = images.fit(np.full(shape, 77, dtype=np.uint8), size)
    assert fitted.shape == (*size, shape[2])
    assert (fitted == 77).all()


def test_fit_crops_the_centre_and_keeps_the_aspect() -> None:
    wide = np.zeros((10, 30, 3), dtype=np.uint8)
    wide[:, 10:20] = 200
    assert (images.fit(wide, (10, 10)) == 200).all()
    assert (images.fit(wide.transpose(1, 0, 2), (10, 10)) == 200).all()
    square = noise(10, 10)
    assert images.fit(square, (10, 10)) is square


def test_fit_is_antialiased() -> None:
    checks = np.indices((64, 64)).sum(axis=0) % 2 * np.uint8(255)
    fitted = images.fit(checks.astype(np.uint8)[..., None], (8, 8))
    assert abs(fitted.astype(int) - 127).max() <= 2


def test_decode_with_size_is_decode_then_fit() -> None:
    data = encoded(Image.fromarray(noise(40, 60)), "JPEG")
    expected = images.fit(images.decode(data, name="x"), (16, 16))
    assert np.array_equal(images.decode(data, name="x", size=(16, 16)), expected)


def test_grey_is_the_grey_of_decode() -> None:
    pixels = noise(50, 50)
    assert np.array_equal(images.grey(pixels), images.decode(images.encode_png(pixels), name="x", channels=1))


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
    tensor = as_input(torch.from_numpy(pixels))
    assert tensor.shape == (1, 1, 16, 16)
    assert tensor.dtype == torch.float32
    assert tensor.max() == 1
    assert np.array_equal(images.to_uint8(tensor).permute(0, 2, 3, 1).numpy(), pixels)
    assert torch.equal(images.round_8bit(tensor), tensor)


def test_rounding_is_to_the_nearest_after_clamping() -> None:
    values = torch.tensor([-3.0, 0.4 / 255, 0.6 / 255, 254.6 / 255, 7.0]).view(1, 1, 1, 5)
    assert images.to_uint8(values).flatten().tolist() == [0, 0, 1, 255, 255]
    assert torch.equal(images.round_8bit(values).flatten(), torch.tensor([0, 0, 1, 255, 255]) / 255)


def test_grid_shows_every_pixel() -> None:
    rows = [noise(4, 5)[None].repeat(3, axis=0), noise(4, 5, 1)[None]]
    picture = images.grid(rows, labels=["a", "longer"], scale=2)
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
    found = images.find_images(tmp_path)
    assert [file.relative_to(tmp_path).as_posix() for file in found] == ["a.webp", "b/1.png", "b/2.JPG"]
    assert images.find_images(tmp_path / "a.webp") == [tmp_path / "a.webp"]
    with pytest.raises(DataError, match=r"\.hidden/empty does not exist"):
        images.find_images(tmp_path / ".hidden" / "empty")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty holds no image"):
        images.find_images(tmp_path / "empty")
