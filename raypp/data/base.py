"""Base of all data sources: labeled images one by one, or a whole split in memory."""

from __future__ import annotations

import hashlib
import json
import os
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from raypp.data.memory import check_memory
from raypp.utils import registry
from raypp.utils.errors import DataError
from raypp.utils.images import Pixels, decode, printable

Split = Literal["train", "test"]
Labels = npt.NDArray[np.int64]
Item = tuple[str, int, bytes | Path | None]
"""Name, label and encoded image, or the path of its file."""

# Threads are faster for images of this many encoded bytes or more. Below, the interpreter's lock costs more than the
# decoding (32 x 32 JPEG: 59 us per image in one thread, 133 us in two; 224 x 224: 447 us and 261 us; 2 cores).
MIN_BYTES_FOR_THREADS = 4096
NUM_THREADS = min(8, os.cpu_count() or 1)  # that decode or encode images


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """Labeled images in memory.

    Attributes:
        images: uint8 (N, H, W, C).
        labels: int64 (N,), each in 0..len(classes)-1.
        classes: name of each label.
    """

    images: Pixels
    labels: Labels
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: npt.ArrayLike) -> ImageDataset:
        """Return the images at ``indices`` (int array), in that order."""
        indices = np.asarray(indices, dtype=np.int64)
        return ImageDataset(self.images[indices], self.labels[indices], self.classes)

    def fingerprint(self) -> str:
        """Return the SHA-256 (hex) of classes, shape, labels and pixels, whatever their memory layout."""
        digest = Fingerprint()
        for image in self.images:
            digest.add(image)
        return digest.hexdigest(self.images.shape[1:], self.labels, self.classes)


class Fingerprint:
    """Computes :meth:`ImageDataset.fingerprint` image by image."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, image: Pixels) -> None:
        """Add uint8 (H, W, C)."""
        self._digest.update(image.tobytes())

    def hexdigest(self, shape: tuple[int, ...], labels: npt.ArrayLike, classes: tuple[str, ...]) -> str:
        """Return the digest of the images, their shape (H, W, C), their labels (N,) and the class names."""
        self._digest.update(np.asarray(labels, dtype="<i8").tobytes())
        self._digest.update(json.dumps([shape, classes]).encode())
        return self._digest.hexdigest()


class Example(NamedTuple):
    """One image of a source, or the reason why it cannot be used."""

    name: str
    label: int
    image: Pixels | DataError

    def pixels(self) -> Pixels:
        """Return the image; raises its DataError."""
        if isinstance(self.image, DataError):
            raise self.image
        return self.image


class DataSource(ABC):
    """A named set of labeled images with a train and a test split.

    Args:
        size: (H, W) to resize every image to; None requires images of one size.
        channels: 3 for RGB, 1 for grey.
    """

    Options: ClassVar[type[registry.MethodConfig]]
    published_sizes: ClassVar[dict[str, int]] = {}
    """Number of images of each split, if it is known without the data."""

    def __init__(self, options: Any, *, size: tuple[int, int] | None = None, channels: int = 3) -> None:
        self.options = options
        self.size = size
        self.channels = channels

    @property
    @abstractmethod
    def classes(self) -> tuple[str, ...]:
        """Name of each label, in label order."""

    @abstractmethod
    def num_images(self, split: Split) -> int:
        """Return the number of images in ``split``, readable or not."""

    @abstractmethod
    def _read(self, split: Split) -> Iterator[Example]:
        """Yield the images of ``split`` in their fixed order."""

    def versions(self, split: Split) -> list[tuple[str, int, int]] | None:
        """Return path, bytes and time of the last change (ns) of each file in ``split``; None if it is not known."""
        return None

    def unused(self) -> tuple[str, ...]:
        """Return paths in the source that look like data but belong to no split."""
        return ()

    def problems(self) -> tuple[str, ...]:
        """Return a sentence for each file that keeps the source from being read."""
        return ()

    def examples(self, split: Split) -> Iterator[Example]:
        """Yield the images of ``split`` one by one, in bounded memory.

        A DataError replaces an image that cannot be read, or whose size differs from the first one.
        """
        shape: tuple[int, ...] | None = None
        for example in self._read(split):
            if isinstance(example.image, np.ndarray):
                shape = shape or example.image.shape
                if (other := example.image.shape) != shape:
                    error = DataError(
                        f"{example.name} is {other[0]} x {other[1]} pixels where the images before it are {shape[0]} x "
                        f"{shape[1]}; set data.image_size"
                    )
                    example = example._replace(image=error)
            yield example

    def load(self, split: Split) -> ImageDataset:
        """Read a whole split into memory; raises DataError for an unusable image, or a split without two classes."""
        num = self.num_images(split)
        images: Pixels | None = None
        labels = np.empty(num, dtype=np.int64)
        for i, example in enumerate(self.examples(split)):
            pixels = example.pixels()
            if images is None:
                check_memory(num, pixels.shape)
                images = np.empty((num, *pixels.shape), dtype=np.uint8)
            images[i], labels[i] = pixels, example.label
        check_labels(labels, split, self.classes if num else ())
        assert images is not None
        return ImageDataset(images, labels, self.classes)


def check_labels(labels: npt.ArrayLike, split: Split, classes: tuple[str, ...]) -> None:
    """Raise DataError if a split has no image or one class, which allows neither training nor evaluation."""
    present = np.unique(np.asarray(labels))
    if not len(present):
        raise DataError(f"the {split} split has no images; allowed are images of two classes or more")
    if len(present) == 1:
        raise DataError(
            f"every image of the {split} split has the class {classes[present[0]]!r}; allowed are two classes or more"
        )


def check_names(names: Iterable[str], where: str) -> tuple[str, ...]:
    """Return class names of ``where`` (file or folder): at least two, printable, distinguishable; raises DataError."""
    classes = tuple(names)
    names_by_form: dict[str, str] = {}
    for name in classes:
        if not name.strip() or printable(name) != name:
            raise DataError(
                f"{where} has the class name '{printable(name)}'; allowed are names in UTF-8 without control characters"
            )
        # macOS writes accents as separate characters.
        form = " ".join(unicodedata.normalize("NFC", name).split())
        other = names_by_form.get(form)
        if other == name:
            raise DataError(f"{where} has the class name {name!r} twice; allowed are names that differ")
        if other is not None:
            raise DataError(
                f"{where} has the class names {other!a} and {name!a}, which look the same; rename one of them"
            )
        names_by_form[form] = name
    if len(classes) < 2:
        listed = f"the single class {classes[0]!r}" if classes else "no class"
        raise DataError(f"{where} has {listed}; allowed are two classes or more")
    return classes


def first_names(names: Iterable[str]) -> str:
    """Join the first five names for a message, escaped, with ", ..." if there are more."""
    escaped = list(map(printable, names))
    return ", ".join(escaped[:5]) + ", ..." * (len(escaped) > 5)


def decode_all(items: Iterable[Item], *, size: tuple[int, int] | None, channels: int) -> Iterator[Example]:
    """Decode in bounded memory, large images in threads, and yield the examples in the order of ``items``."""

    decode_item = partial(_decode_item, size=size, channels=channels)
    iterator = iter(items)
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        while block := list(islice(iterator, 64)):
            use_threads = max(_num_bytes(data) for _, _, data in block) >= MIN_BYTES_FOR_THREADS
            yield from (pool.map if use_threads else map)(decode_item, block)


def _num_bytes(data: bytes | Path | None) -> int:
    return data.stat().st_size if isinstance(data, Path) else len(data or b"")


def _decode_item(item: Item, size: tuple[int, int] | None, channels: int) -> Example:
    name, label, data = item
    image: Pixels | DataError
    try:
        image = decode(read_encoded(data, name), name=name, size=size, channels=channels)
    except DataError as error:
        image = error
    return Example(name, label, image)


def read_encoded(data: bytes | Path | None, name: str) -> bytes:
    """Return an encoded image, read from its file if need be; raises DataError if there is none."""
    if data is None:
        raise DataError(f"{name} holds no image bytes")
    try:
        return data.read_bytes() if isinstance(data, Path) else data
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error.strerror}") from error


def stratified_split(labels: npt.ArrayLike, num_val: int, seed: int) -> tuple[Labels, Labels]:
    """Split indices of ``labels`` (N,) at random so that both parts have the same class proportions.

    The second part has ``num_val`` indices; the largest remainders decide how classes share it. The same seed gives
    the same split. DataError is raised unless ``num_val`` is in 0..N-1.

    Returns:
        Sorted int64 indices (N - num_val,) and (num_val,).
    """
    values = np.asarray(labels)
    total = len(values)
    if not 0 <= num_val < total:
        raise DataError(
            f"cannot set {num_val} of {total} images aside; allowed is 0 to {total - 1} (see data.num_val and "
            "data.num_test)"
        )
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    num_per_class, remainder = np.divmod(counts * num_val, total)
    num_per_class[np.argsort(-remainder, kind="stable")[: num_val - num_per_class.sum()]] += 1
    rng = np.random.default_rng(seed)
    is_val = np.zeros(total, dtype=bool)
    for label, num in enumerate(num_per_class):
        is_val[rng.permutation(np.flatnonzero(inverse == label))[:num]] = True
    return np.flatnonzero(~is_val), np.flatnonzero(is_val)
