"""The client's side: protect images with the public part of a bundle. No network, no classifier, no Ray."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from raypp.bundle.load import PublicBundle, load_public
from raypp.utils.errors import DataError, StorageError
from raypp.utils.image_files import find_images
from raypp.utils.images import Pixels, decode, write_png
from raypp.utils.keys import Key
from raypp.utils.storage import new_folder

BATCH_PIXELS = 2**20  # images are protected together up to this many pixels: 1,024 of 32 x 32, one photograph


def protect_images(bundle: PublicBundle, images: Pixels) -> Pixels:
    """Protect a batch.

    Args:
        images: uint8 (N, H, W, C), C as the bundle's ``channels``.

    Returns:
        protected images, uint8 (N, H, W, C), or larger where the protection fills up blocks.
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
        location: a bundle or its public folder.
        target: a ``.png`` file for one image; for a folder, a folder that does not exist or is empty, which appears
            complete or not at all and mirrors the source's subfolders.
        key: key file of a keyed protection; a whole bundle has it in its private part.
        keep_size: protect at each image's own size, not at the bundle's.
        console: where to show progress.

    Raises:
        BundleError: the bundle is missing, altered or incomplete, or its key is.
        ConfigError: ``key`` names no key file.
        DataError: an image cannot be read.
        StorageError: the target exists, has another suffix than ``.png``, or cannot be written.
    """
    paths = find_images(source)
    single = source.is_file()
    if single and target.suffix.lower() != ".png":
        raise StorageError(f"target {str(target)!r} must end in .png: lossy formats destroy what the classifier reads")
    if single and target.exists():
        raise StorageError(f"target {str(target)!r} exists already; give a new file")
    if not target.name:
        raise StorageError(f"target {str(target)!r} cannot be replaced; give a new or empty folder")
    if not single and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise StorageError(f"target {str(target)!r} exists already; give a new or empty folder")
    bundle = load_public(location, None if key is None else Key.read(key))
    if single:
        image = _read(paths[0], bundle, keep_size)
        _make_folder(target.parent)
        write_png(target, protect_images(bundle, image[None])[0])
    else:
        outputs = [target / path.relative_to(source).with_suffix(".png") for path in paths]
        _refuse_clashes(paths, outputs)
        with new_folder(target) as aside:
            jobs = list(zip(paths, outputs, strict=True))
            height, width = bundle.image_size
            together = 1 if keep_size else max(1, BATCH_PIXELS // (height * width))
            groups = [jobs[start : start + together] for start in range(0, len(jobs), together)]
            hidden = console is None or not console.is_terminal
            for group in track(groups, "protecting", console=console, disable=hidden, transient=True):
                loaded = np.stack([_read(path, bundle, keep_size) for path, _ in group])
                for protected, (_, output) in zip(protect_images(bundle, loaded), group, strict=True):
                    file = aside / output.relative_to(target)
                    file.parent.mkdir(parents=True, exist_ok=True)
                    write_png(file, protected)
    if console is not None:
        size = "their own size" if keep_size else f"{bundle.image_size[0]} x {bundle.image_size[1]}"
        console.print(
            f"protected {len(paths):,} image{'s' * (len(paths) != 1)} at {size}: {target}",
            markup=False,
            highlight=False,
        )
    return len(paths)


def read_image(path: Path, size: tuple[int, int] | None = None, channels: int = 3) -> Pixels:
    """Read an image file as uint8 (H, W, channels), fitted to ``size``; raises DataError as images.decode does."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    return decode(data, name=str(path), size=size, channels=channels)


def _read(path: Path, bundle: PublicBundle, keep_size: bool) -> Pixels:
    image = read_image(path, None if keep_size else bundle.image_size, bundle.channels)
    least = bundle.protection.least_side
    if min(image.shape[:2]) < least:
        raise DataError(f"{path} is {image.shape[0]} x {image.shape[1]}; the protection needs sides of {least} or more")
    return image


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot create {str(folder)!r}: {error.strerror}") from error


def _refuse_clashes(paths: list[Path], outputs: list[Path]) -> None:
    seen: dict[Path, Path] = {}
    for path, output in zip(paths, outputs, strict=True):
        if output in seen:
            raise StorageError(f"{seen[output]} and {path} would both become {output}; rename one of them")
        seen[output] = path
