"""The client's side, offline: what is protected, what is refused, and that nothing half-written remains."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Trained
from PIL import Image
from rich.console import Console

from raypp.bundle.load import PublicBundle, load_public
from raypp.client.offline import protect_files, protect_images
from raypp.utils.errors import BundleError, DataError, RayppError, StorageError
from raypp.utils.images import decode

RNG = np.random.default_rng(0)


def picture(height: int = 16, width: int = 16, channels: int = 3) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, channels), dtype=np.uint8)


def save(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(path)
    return path


def tree(folder: Path) -> list[str]:
    """Everything below a folder, hidden files and folders too."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))


@pytest.fixture(scope="session")
def public(trained: Trained) -> PublicBundle:
    return load_public(trained.bundle)


def expected(public: PublicBundle, path: Path, size: tuple[int, int] | None = (16, 16)) -> np.ndarray:
    image = decode(path.read_bytes(), name="", size=size)
    return protect_images(public, image[None])[0]


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.mode == "RGB"
        return np.array(image)


def test_one_image(trained: Trained, public: PublicBundle, tmp_path: Path) -> None:
    source = save(tmp_path / "in.png", picture())
    assert protect_files(trained.bundle, source, tmp_path / "out.png") == 1
    assert np.array_equal(read(tmp_path / "out.png"), expected(public, source))
    assert not np.array_equal(read(tmp_path / "out.png"), read(source))
    assert tree(tmp_path) == ["in.png", "out.png"]


def test_the_public_part_alone_is_enough(trained: Trained, public: PublicBundle, tmp_path: Path) -> None:
    source = save(tmp_path / "in.png", picture())
    alone = tmp_path / "public"
    alone.symlink_to(trained.bundle / "public")
    for location in (alone, str(alone), f"file://{alone}"):
        target = tmp_path / "out.png"
        target.unlink(missing_ok=True)
        protect_files(location, source, target)
        assert np.array_equal(read(target), expected(public, source))


def test_folders_are_mirrored(trained: Trained, public: PublicBundle, tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "deep" / "out"
    names = ["a.png", "b.jpg", "sub/a.webp", "sub/deeper/c d.bmp", "ünï/x.PNG"]
    for name in names:
        save(source / name, picture(20, 24))
    (source / "notes.txt").write_text("not an image")
    save(source / ".hidden.png", picture())
    assert protect_files(trained.bundle, source, target) == 5
    outputs = [p for p in tree(target) if p.endswith(".png")]
    assert outputs == sorted(str(Path(name).with_suffix(".png")) for name in names)
    assert len(tree(target)) == 5 + 3, "no more than the images and their folders"
    for name in names:
        assert np.array_equal(read(target / Path(name).with_suffix(".png")), expected(public, source / name))
    assert tree(target.parent) == sorted(["out", *(f"out/{name}" for name in tree(target))])


def test_more_images_than_a_batch(trained: Trained, public: PublicBundle, tmp_path: Path) -> None:
    for i in range(70):
        save(tmp_path / "in" / f"{i:02}.png", picture())
    assert protect_files(trained.bundle, tmp_path / "in", tmp_path / "out") == 70
    for i in (0, 63, 64, 69):
        assert np.array_equal(read(tmp_path / "out" / f"{i:02}.png"), expected(public, tmp_path / "in" / f"{i:02}.png"))


def test_an_empty_target_folder_is_taken(trained: Trained, tmp_path: Path) -> None:
    save(tmp_path / "in" / "a.png", picture())
    (tmp_path / "out").mkdir()
    protect_files(trained.bundle, tmp_path / "in", tmp_path / "out")
    assert tree(tmp_path / "out") == ["a.png"]


ODD = {
    "grey": picture(16, 16, 1),
    "RGBA": picture(16, 16, 4),
    "odd": picture(37, 21),
    "wide": picture(9, 64),
    "tiny": picture(1, 1),
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("keep_size", [False, True])
def test_any_image_becomes_what_the_classifier_reads(
    trained: Trained, public: PublicBundle, tmp_path: Path, kind: str, keep_size: bool
) -> None:
    source = save(tmp_path / "in.png", ODD[kind])
    protect_files(trained.bundle, source, tmp_path / "out.png", keep_size=keep_size)
    pixels = read(tmp_path / "out.png")
    assert pixels.shape == ((*ODD[kind].shape[:2], 3) if keep_size else (16, 16, 3))
    assert np.array_equal(pixels, expected(public, source, None if keep_size else (16, 16)))


def test_folders_of_mixed_sizes_keep_them(trained: Trained, public: PublicBundle, tmp_path: Path) -> None:
    for name, pixels in ODD.items():
        save(tmp_path / "in" / f"{name}.png", pixels)
    protect_files(trained.bundle, tmp_path / "in", tmp_path / "out", keep_size=True)
    for name in ODD:
        assert np.array_equal(
            read(tmp_path / "out" / f"{name}.png"), expected(public, tmp_path / "in" / f"{name}.png", None)
        )


def test_protection_does_not_depend_on_the_company(public: PublicBundle) -> None:
    """Batch statistics must not be used: an upload is the same alone and among others."""
    images = np.stack([picture() for _ in range(5)])
    together = protect_images(public, images).astype(int)
    alone = np.concatenate([protect_images(public, image[None]) for image in images]).astype(int)
    assert abs(together - alone).max() <= 1  # a sum in another order may cross a rounding border


# What is refused


def refusal(kind: type[RayppError], *arguments: Any, **options: Any) -> str:
    with pytest.raises(kind) as raised:
        protect_files(*arguments, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_target_that_exists_is_refused(trained: Trained, tmp_path: Path) -> None:
    source = save(tmp_path / "in" / "a.png", picture())
    other = save(tmp_path / "out" / "other.png", picture())
    before = other.read_bytes()
    assert "exists already; give a new or empty folder" in refusal(
        StorageError, trained.bundle, source.parent, other.parent
    )
    assert "exists already; give a new or empty folder" in refusal(StorageError, trained.bundle, source.parent, other)
    assert "exists already; give a new file" in refusal(StorageError, trained.bundle, source, other)
    assert "exists already; give a new file" in refusal(StorageError, trained.bundle, source, source)
    assert other.read_bytes() == before
    assert tree(tmp_path) == ["in", "in/a.png", "out", "out/other.png"]


@pytest.mark.parametrize("name", ["out.jpg", "out.jpeg", "out", "out.png.webp"])
def test_lossy_targets_are_refused(trained: Trained, tmp_path: Path, name: str) -> None:
    source = save(tmp_path / "in.png", picture())
    assert "must end in .png: lossy formats destroy" in refusal(StorageError, trained.bundle, source, tmp_path / name)
    assert tree(tmp_path) == ["in.png"]


def test_after_an_unreadable_image_nothing_half_written_remains(trained: Trained, tmp_path: Path) -> None:
    for i in range(70):  # the damaged one comes after a whole batch was written
        save(tmp_path / "in" / f"{i:02}.png", picture())
    bad = tmp_path / "in" / "zz.png"
    bad.write_bytes((tmp_path / "in" / "00.png").read_bytes()[:50])
    before = tree(tmp_path)
    assert str(bad) in refusal(DataError, trained.bundle, tmp_path / "in", tmp_path / "out")
    assert tree(tmp_path) == before
    bad.write_bytes(b"no image")
    assert "is not an image" in refusal(DataError, trained.bundle, bad, tmp_path / "out.png")
    assert tree(tmp_path) == before


def test_names_that_would_clash_are_refused(trained: Trained, tmp_path: Path) -> None:
    save(tmp_path / "in" / "a.png", picture())
    save(tmp_path / "in" / "a.jpg", picture())
    sentence = refusal(StorageError, trained.bundle, tmp_path / "in", tmp_path / "out")
    assert f"{tmp_path}/in/a.jpg and {tmp_path}/in/a.png would both become {tmp_path}/out/a.png" in sentence
    assert tree(tmp_path) == ["in", "in/a.jpg", "in/a.png"]


def test_sources_and_targets_that_cannot_be(trained: Trained, tmp_path: Path) -> None:
    source = save(tmp_path / "in" / "a.png", picture())
    (tmp_path / "empty").mkdir()
    assert refusal(DataError, trained.bundle, tmp_path / "none", tmp_path / "out").endswith("does not exist")
    assert "holds no image" in refusal(DataError, trained.bundle, tmp_path / "empty", tmp_path / "out")
    assert "cannot create" in refusal(StorageError, trained.bundle, source, source / "below.png")
    assert "cannot write" in refusal(StorageError, trained.bundle, source.parent, source / "below")
    assert "does not exist" in refusal(BundleError, tmp_path / "none", source, tmp_path / "out.png")
    assert tree(tmp_path) == ["empty", "in", "in/a.png"]


@pytest.mark.parametrize("name", [".", ".."])
def test_the_folder_one_stands_in_is_no_target(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    save(tmp_path / "in" / "a.png", picture())
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    assert "give a new or empty folder" in refusal(StorageError, trained.bundle, tmp_path / "in", Path(name))
    assert tree(tmp_path) == ["in", "in/a.png", "out"]


def test_it_says_what_it_did(trained: Trained, tmp_path: Path) -> None:
    source = save(tmp_path / "in.png", picture())
    for keep, sentence in ((False, "protected 1 image at 16 x 16: "), (True, "protected 1 image at their own size: ")):
        text = io.StringIO()
        target = tmp_path / f"{keep}.png"
        protect_files(trained.bundle, source, target, keep_size=keep, console=Console(file=text, width=500))
        assert text.getvalue() == f"{sentence}{target}\n"
