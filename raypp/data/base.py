"""What every data source offers: labelled images one by one, or a whole split in memory."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from raypp.utils import registry
from raypp.utils.errors import DataError
from raypp.utils.images import Pixels, decode, printable

Split = Literal["train", "test"]
Labels = npt.NDArray[np.int64]
Item = tuple[str, int, bytes | Path | None]
"""Name, label and encoded image (or the path of its file) before decoding."""

# Threads pay for images of this many encoded bytes or more; below, handing the interpreter's lock around costs more
# than decoding (32 x 32 JPEG: 59 us an image in one thread, 133 us in two; 224 x 224: 447 us and 261 us; 2 cores).
THREADS_FROM = 4096

CGROUP_ROOT, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
CGROUP_FILES = {
    2: ("memory.max", "memory.current", "inactive_file"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
"""Where Linux says what a container may take and has taken, and which part of memory.stat it can free at once."""


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """Labelled images in memory.

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
        chosen = np.asarray(indices, dtype=np.int64)
        return ImageDataset(self.images[chosen], self.labels[chosen], self.classes)

    def fingerprint(self) -> str:
        """Return the SHA-256 (hex) of classes, shape, labels and pixels; the memory layout does not matter."""
        digest = Fingerprint()
        for image in self.images:
            digest.add(image)
        return digest.hexdigest(self.images.shape[1:], self.labels, self.classes)


class Fingerprint:
    """The digest behind :meth:`ImageSet.fingerprint`, fed image by image."""

    def __init__(self) -> None:
        self._sha = hashlib.sha256()

    def add(self, image: Pixels) -> None:
        """Add uint8 (H, W, C)."""
        self._sha.update(image.tobytes())

    def hexdigest(self, shape: tuple[int, ...], labels: npt.ArrayLike, classes: tuple[str, ...]) -> str:
        """Close the digest with the images' (H, W, C), their labels (N,) and the class names."""
        self._sha.update(np.asarray(labels, dtype="<i8").tobytes())
        self._sha.update(json.dumps([shape, classes]).encode())
        return self._sha.hexdigest()


class Example(NamedTuple):
    """One image of a source, or the reason why it cannot be used."""

    name: str
    label: int
    image: Pixels | DataError


class DataSource(ABC):
    """A named set of labelled images with a train and a test split.

    Args:
        options: the validated options of the source.
        size: (H, W) that every image is fitted to; None takes images as they are, all of one size.
        channels: 3 for RGB, 1 for grey.
    """

    Options: ClassVar[type[registry.MethodConfig]]

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
        """Return how many images ``split`` has, readable or not."""

    @abstractmethod
    def _read(self, split: Split) -> Iterator[Example]:
        """Yield the images of ``split`` in their fixed order."""

    def unused(self) -> tuple[str, ...]:
        """Return paths in the source that look like data and belong to no split that is read."""
        return ()

    def records(self, split: Split) -> Iterator[Example]:
        """Yield the images of ``split`` one by one, in bounded memory.

        An image that cannot be read, or whose size is not that of the first one, comes with a DataError in its place.
        """
        shape: tuple[int, ...] | None = None
        for record in self._read(split):
            if isinstance(record.image, np.ndarray):
                shape = shape or record.image.shape
                if record.image.shape != shape:
                    record = record._replace(
                        image=DataError(
                            f"{record.name} is {record.image.shape[0]} x {record.image.shape[1]} pixels where the "
                            f"images before it are {shape[0]} x {shape[1]}; set data.image_size"
                        )
                    )
            yield record

    def load(self, split: Split) -> ImageDataset:
        """Read a whole split into memory.

        Raises:
            DataError: for the first image that cannot be used, or if the split has no image or one class.
        """
        num = self.num_images(split)
        images: Pixels | None = None
        if self.size is not None:
            check_memory(num, (*self.size, self.channels))
        labels = np.empty(num, dtype=np.int64)
        for i, record in enumerate(self.records(split)):
            if isinstance(record.image, DataError):
                raise record.image
            if images is None:
                if self.size is None:
                    check_memory(num, record.image.shape)
                images = np.empty((num, *record.image.shape), dtype=np.uint8)
            images[i] = record.image
            labels[i] = record.label
        check_labels(labels, split, self.classes if num else ())
        assert images is not None
        return ImageDataset(images, labels, self.classes)


def check_labels(labels: npt.ArrayLike, split: Split, classes: tuple[str, ...]) -> None:
    """Raise DataError if a split has no image or one class: nothing can be learned or measured then."""
    present = np.unique(np.asarray(labels))
    if not len(present):
        raise DataError(f"the {split} split has no images; allowed are images of two classes or more")
    if len(present) == 1:
        raise DataError(
            f"every image of the {split} split has the class {classes[present[0]]!r}; allowed are two classes or more"
        )


def check_names(names: Iterable[str], where: str) -> tuple[str, ...]:
    """Return class names if they are two or more that can be written and told apart; raises DataError.

    Args:
        where: what holds the names, such as "train.parquet".
    """
    classes = tuple(names)
    seen: dict[str, str] = {}
    for name in classes:
        if not name.strip() or not printable(name) == name:
            raise DataError(
                f"{where} has the class name '{printable(name)}'; allowed are names in UTF-8 without control characters"
            )
        like = seen.get(plain_name(name))
        if like == name:
            raise DataError(f"{where} has the class name {name!r} twice; allowed are names that differ")
        if like is not None:
            raise DataError(
                f"{where} has the class names {like!a} and {name!a}, which look the same; rename one of them"
            )
        seen[plain_name(name)] = name
    if len(classes) < 2:
        listed = f"the single class {classes[0]!r}" if classes else "no class"
        raise DataError(f"{where} has {listed}; allowed are two classes or more")
    return classes


def plain_name(name: str) -> str:
    """A class name in one Unicode form, without space around it: macOS writes accents as characters of their own."""
    return " ".join(unicodedata.normalize("NFC", name).split())


def decode_all(items: Iterable[Item], *, size: tuple[int, int] | None, channels: int) -> Iterator[Example]:
    """Decode in bounded memory, large images in threads, and yield the records in the order of ``items``."""

    def attempt(item: Item) -> Example:
        name, label, data = item
        return Example(name, label, _decode_one(data, name, size, channels))

    iterator = iter(items)
    with ThreadPoolExecutor(num_threads()) as pool:
        while block := list(islice(iterator, 64)):
            threaded = max(_num_bytes(data) for _, _, data in block) >= THREADS_FROM
            yield from pool.map(attempt, block) if threaded else map(attempt, block)


def num_threads() -> int:
    """Return how many threads to decode or encode images in."""
    return min(8, os.cpu_count() or 1)


def _num_bytes(data: bytes | Path | None) -> int:
    return data.stat().st_size if isinstance(data, Path) else len(data or b"")


def _decode_one(
    data: bytes | Path | None, name: str, size: tuple[int, int] | None, channels: int
) -> Pixels | DataError:
    try:
        if isinstance(data, Path):
            data = data.read_bytes()
        if data is None:
            raise DataError(f"{name} holds no image bytes")
        return decode(data, name=name, size=size, channels=channels)
    except DataError as error:
        return error
    except OSError as error:
        return DataError(f"{name} cannot be read: {error.strerror}")


def check_memory(num: int, shape: tuple[int, ...]) -> None:
    """Raise DataError if ``num`` uint8 images of ``shape`` (H, W, C), kept twice while they are split and moved, need
    over 60 % of the available memory."""
    available = available_memory()
    if available is None:
        return
    needed = 2 * num * int(np.prod(shape))
    if needed > 0.6 * available:
        raise DataError(
            f"{num} images of {' x '.join(map(str, shape))} need {needed / 1e9:.1f} GB and 60 % of the available "
            f"memory is {0.6 * available / 1e9:.1f} GB; set data.stream=true or a smaller data.image_size"
        )


def available_memory() -> int | None:
    """Bytes that this process may still take, within a container's limit too; None where that cannot be told."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
    free = [int(fields["MemAvailable"].split()[0]) * 1024]
    for folder, version in _cgroups():
        limit, used, cached = CGROUP_FILES[version]
        with contextlib.suppress(OSError, ValueError):  # ValueError: "max", which is no limit
            in_use = int((folder / used).read_text()) - _reclaimable_bytes(folder / "memory.stat", cached)
            free.append(int((folder / limit).read_text()) - max(0, in_use))
    return max(0, min(free))


def _cgroups() -> Iterator[tuple[Path, int]]:
    """Folders of the memory control groups that this process is in, innermost first, with their version."""
    try:
        lines = OWN_CGROUPS.read_text().splitlines()
    except OSError:
        lines = ["0::/", "0:memory:/"]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, version = CGROUP_ROOT, 2
        elif "memory" in controllers.split(","):
            root, version = CGROUP_ROOT / "memory", 1
        else:
            continue
        inner = root / path.lstrip("/")
        # In a container the path is often that of the host, and only the root is there.
        yield from ((folder, version) for folder in (inner, *inner.parents) if folder.is_relative_to(root))


def _reclaimable_bytes(stat: Path, field: str) -> int:
    """Bytes of files that nobody has read of late: the kernel gives them up before it refuses memory."""
    try:
        fields = dict(line.split() for line in stat.read_text().splitlines())
        return int(fields.get(field, 0))
    except (OSError, ValueError):
        return 0


def stratified_split(labels: npt.ArrayLike, num_val: int, seed: int) -> tuple[Labels, Labels]:
    """Split indices at random so that every class keeps its share in both parts.

    Args:
        labels: integers (N,).
        num_val: how many go to the second part, 0..N-1; classes share them by largest remainder.
        seed: the same seed gives the same split.

    Returns:
        Sorted int64 indices (N - num_val,) and (num_val,).

    Raises:
        DataError: ``num_val`` is out of range.
    """
    values = np.asarray(labels)
    total = len(values)
    if not 0 <= num_val < total:
        raise DataError(
            f"cannot set {num_val} of {total} images aside; allowed is 0 to {total - 1} (see data.num_val and "
            "data.num_test)"
        )
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    share, remainder = np.divmod(counts * num_val, total)
    share[np.argsort(-remainder, kind="stable")[: num_val - share.sum()]] += 1
    rng = np.random.default_rng(seed)
    chosen = np.zeros(total, dtype=bool)
    for label, num in enumerate(share):
        chosen[rng.permutation(np.flatnonzero(inverse == label))[:num]] = True
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)
