"""Protect images with the public part of a bundle, without network, classifier or Ray."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from raypp.bundle.load import PublicBundle, load_public
from raypp.bundle.locate import locate_bundle
from raypp.utils.errors import DataError, StorageError
from raypp.utils.image_files import find_images
from raypp.utils.images import Pixels, decode, write_png
from raypp.utils.keys import Key
from raypp.utils.storage import new_folder

BATCH_PIXELS = 2**20  # of a batch: 1,024 images of 32 x 32, or one photograph


def protect_images(bundle: PublicBundle, images: Pixels) -> Pixels:
    """Protect a batch.

    Args:
        images: uint8 (N, H, W, C), C as the bundle's ``channels``.

    Returns:
        protected images uint8 (N, H, W, C), larger if the protection pads images to whole blocks.
    """
    protected = bundle.protection.protect(torch.from_numpy(images).permute(0, 3, 1, 2))
    return protected.permute(0, 2, 3, 1).contiguous().numpy()


def protect_files(
    location: str | Path,
    source: Path,
    target: Path,
    *,
    key: Path | None = None,
    keep_size: bool = False,
    console: Console | None = None,
) -> int:
    """Protect an image, or every image below a folder, and write PNG files; returns their number.

    Args:
        location: location of a bundle, see :func:`raypp.bundle.locate.locate_bundle`.
        target: a new ``.png`` file for one image; a new or empty folder for a folder. It mirrors the subfolders of the
            source, and remains unchanged after an error.
        key: key file of a keyed protection; a whole bundle has the key in its private part.
        keep_size: keep the size of each image instead of the bundle's.
        console: shows progress.

    Raises:
        BundleError: the bundle or its key is missing, altered or incomplete.
        ConfigError: ``key`` names no key file.
        DataError: an image cannot be read.
        StorageError: the target exists, has another suffix than ``.png``, or cannot be written.
    """
    paths = find_images(source)
    _check_target(source, target)
    bundle = load_public(locate_bundle(location), None if key is None else Key.read(key))
    if source.is_file():
        image = _read(paths[0], bundle, keep_size)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot create {str(target.parent)!r}: {error.strerror}") from error
        write_png(target, protect_images(bundle, image[None])[0])
    else:
        _protect_folder(bundle, paths, source, target, keep_size, console)
    if console is not None:
        size = "their own size" if keep_size else f"{bundle.image_size[0]} x {bundle.image_size[1]}"
        summary = f"protected {len(paths):,} image{'s' * (len(paths) != 1)} at {size}: {target}"
        console.print(summary, markup=False, highlight=False)
    return len(paths)


def _check_target(source: Path, target: Path) -> None:
    if source.is_file() and target.suffix.lower() != ".png":
        raise StorageError(f"target {str(target)!r} must end in .png: lossy formats destroy what the classifier reads")
    if source.is_file() and target.exists():
        raise StorageError(f"target {str(target)!r} exists already; give a new file")
    if not target.name:
        raise StorageError(f"target {str(target)!r} cannot be replaced; give a new or empty folder")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise StorageError(f"target {str(target)!r} exists already; give a new or empty folder")


def _protect_folder(
    bundle: PublicBundle, paths: list[Path], source: Path, target: Path, keep_size: bool, console: Console | None
) -> None:
    sources: dict[Path, Path] = {}  # by output
    for path in paths:
        output = path.relative_to(source).with_suffix(".png")
        if output in sources:
            raise StorageError(f"{sources[output]} and {path} would both become {target / output}; rename one of them")
        sources[output] = path
    outputs, batch_size = list(sources), 1 if keep_size else max(1, BATCH_PIXELS // math.prod(bundle.image_size))
    batches = [outputs[start : start + batch_size] for start in range(0, len(outputs), batch_size)]
    disable = console is None or not console.is_terminal
    with new_folder(target) as temporary:
        for batch in track(batches, "protecting", console=console, disable=disable, transient=True):
            images = np.stack([_read(sources[output], bundle, keep_size) for output in batch])
            for output, protected in zip(batch, protect_images(bundle, images), strict=True):
                (temporary / output).parent.mkdir(parents=True, exist_ok=True)
                write_png(temporary / output, protected)


def read_image(path: Path, size: tuple[int, int] | None = None, channels: int = 3) -> Pixels:
    """Read an image file as uint8 (H, W, channels), fitted to ``size``; raises DataError."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    return decode(data, name=str(path), size=size, channels=channels)


def _read(path: Path, bundle: PublicBundle, keep_size: bool) -> Pixels:
    image = read_image(path, None if keep_size else bundle.image_size, bundle.channels)
    min_side = bundle.protection.least_side
    height, width = image.shape[:2]
    if min(height, width) < min_side:
        raise DataError(f"{path} is {height} x {width}; the protection needs sides of {min_side} or more")
    return image
