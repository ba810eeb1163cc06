"""CIFAR-10 and CIFAR-100 from torchvision, which checks the md5 of every file."""

from __future__ import annotations

import contextlib
import fcntl
import pickle
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from raypp.data.base import DataSource, Example, Split
from raypp.utils import paths, registry
from raypp.utils.errors import DataError
from raypp.utils.images import resize_and_center_crop, to_grayscale


class _Cifar(DataSource):
    published_sizes: ClassVar[dict[str, int]] = {"train": 50_000, "test": 10_000}
    dataset: ClassVar[str]
    """Name of the class in torchvision.datasets."""

    class Options(registry.MethodConfig):
        root: paths.PathOrUri = Field("data", validate_default=True)
        """Folder of the extracted Python version of the data set."""
        download: bool = True
        """Download the data set to ``root`` if it is missing."""

    options: Options

    def __init__(self, options: Options, *, size: tuple[int, int] | None = None, channels: int = 3) -> None:
        super().__init__(options, size=size or (32, 32), channels=channels)
        self._datasets: dict[Split, Any] = {}

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self._open("test").classes)

    def num_images(self, split: Split) -> int:
        return len(self._open(split))

    def _read(self, split: Split) -> Iterator[Example]:
        assert self.size is not None
        dataset = self._open(split)
        for i, (image, label) in enumerate(zip(dataset.data, dataset.targets, strict=True)):
            image = resize_and_center_crop(image, self.size)
            if self.channels == 1:
                image = to_grayscale(image)
            yield Example(f"{self.dataset} {split} image {i}", label, image)

    def _open(self, split: Split) -> Any:
        """Return torchvision's data set, read once; raises DataError that names the missing or damaged file."""
        if split not in self._datasets:
            from torchvision import datasets

            dataset = getattr(datasets, self.dataset)
            root = Path(self.options.root)
            try:
                with _download_lock(root) if self.options.download else contextlib.nullcontext():
                    self._datasets[split] = dataset(root, train=split == "train", download=self.options.download)
            except (RuntimeError, OSError, EOFError, pickle.UnpicklingError, tarfile.TarError, KeyError) as error:
                failed = f"downloading {dataset.url} failed ({error})"
                reason = failed if self.options.download else "data.source.download is false"
                raise DataError(
                    f"{_defect(dataset, root)} and {reason}; data.source.root can point at an existing copy"
                ) from error
        return self._datasets[split]


@contextlib.contextmanager
def _download_lock(root: Path) -> Iterator[None]:
    """Let one process or thread of this machine download and extract at a time; torchvision does neither atomically."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        file = (root / ".download.lock").open("a")
    except OSError:  # a read-only folder contains the data set, or torchvision raises an error
        yield
        return
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _defect(dataset: Any, root: Path) -> str:
    from torchvision.datasets.utils import check_integrity

    folder = root / dataset.base_folder
    published = [(folder / file, md5) for file, md5 in [*dataset.train_list, *dataset.test_list]]
    published.append((folder / dataset.meta["filename"], dataset.meta["md5"]))
    for path, md5 in [*published, (root / dataset.filename, dataset.tgz_md5)]:
        if path.is_file() and not check_integrity(path, md5):
            return f"{path} is damaged (its md5 is not the published one)"
    missing = [path for path, _ in published if not path.is_file()]
    return f"{missing[0]} is missing" if folder.is_dir() and missing else f"{folder} does not exist"


class Cifar10(_Cifar):
    """CIFAR-10: 50,000 + 10,000 color photos of 32 x 32 in 10 classes."""

    dataset = "CIFAR10"

    class Options(_Cifar.Options):
        name: Literal["cifar10"] = "cifar10"


class Cifar100(_Cifar):
    """CIFAR-100: 50,000 + 10,000 color photos of 32 x 32 in 100 fine classes."""

    dataset = "CIFAR100"

    class Options(_Cifar.Options):
        name: Literal["cifar100"] = "cifar100"
