"""Image files in one folder per class."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Literal

from pydantic import Field

from raypp.data.base import DataSource, Example, Split, check_names, decode_all, first_names, stratified_split
from raypp.utils import paths, registry
from raypp.utils.errors import DataError
from raypp.utils.image_files import find_images, is_ignored, is_image, links_to_ancestor, walk_files
from raypp.utils.images import SUFFIXES, printable

TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "testing", "val", "valid", "validation")


class Folder(DataSource):
    """Images in ``train/<class>/`` and ``test/<class>/``, or in ``<class>/`` alone; see the data formats.

    Split folders may also be called ``training``, and ``testing``, ``val``, ``valid`` or ``validation``, in any case.
    Without a train folder, ``test_fraction`` splits the class folders into train and test. Hidden files and files that
    are not images are skipped. Errors are: an image outside a class folder, class folders that contain splits, and
    class folders that all contain folders of the same names.
    """

    class Options(registry.MethodConfig):
        name: Literal["folder"] = "folder"
        path: paths.PathOrUri
        """Folder that contains train and test, or the class folders."""
        test_fraction: float = Field(default=0.1, gt=0, lt=1)
        """Fraction of each class for testing if there is no train folder."""
        seed: int = Field(default=0, ge=0)
        """Selects the images for testing."""

    options: Options

    @cached_property
    def _root(self) -> Path:
        root = Path(self.options.path)
        if not root.is_dir():
            hint = "; data.source.name parquet can read a URI" if "://" in self.options.path else ""
            raise DataError(f"data.source.path {self.options.path} is not a folder{hint}")
        return root

    @cached_property
    def _train_root(self) -> Path:
        if (train := self._split_folder(TRAIN_NAMES)) is not None:
            return train
        test = self._split_folder(TEST_NAMES)
        if test is not None and any(entry.is_dir() for entry in test.iterdir()):  # otherwise it is a class of that name
            raise DataError(f"{self._root} has a folder {test.name} and none for training, allowed is {TRAIN_NAMES[0]}")
        return self._root

    @property
    def _test_root(self) -> Path:
        if (test := self._split_folder(TEST_NAMES)) is not None:
            return test
        raise DataError(f"{self._root} has a train folder and no test folder, allowed is {', '.join(TEST_NAMES)}")

    def _split_folder(self, names: tuple[str, ...]) -> Path | None:
        """Return the folder with the first of these names, in any case; raises DataError if there are two."""
        subfolders = [entry for entry in sorted(self._root.iterdir()) if entry.is_dir()]
        for name in names:
            matches = [folder for folder in subfolders if folder.name.lower() == name]
            if len(matches) > 1:
                raise DataError(f"{self._root} has both {matches[0].name} and {matches[1].name}; rename one of them")
            if matches:
                return matches[0]
        return None

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Sorted names of the class folders; raises DataError if there are fewer than two, or two look the same."""
        root = self._train_root
        folders = _class_folders(root)
        if len(folders) == 1:
            subfolders = [printable(entry.name) for entry in sorted(folders[0].iterdir()) if _is_folder(entry)]
            held = ", ".join(subfolders[:5])
            hint = f"; it holds {held}: is data.source.path one level too high?" if subfolders else ""
            raise DataError(
                f"{printable(root)} has the single class folder {printable(folders[0].name)!r}, allowed are two or "
                f"more{hint}"
            )
        _check_splits(root, folders)
        _check_level(root, folders)
        return check_names(map(_class_name, folders), printable(root))

    def files(self, split: Split) -> list[tuple[str, int]]:
        """Return (path, label) of every image of ``split``, sorted by class and path.

        DataError is raised if it does not exist, a class folder has no image, or test has a class that train lacks.
        """
        if self._train_root == self._root:
            return self._random_split[split]
        return self._list_files(self._train_root) if split == "train" else self._test_files

    def versions(self, split: Split) -> list[tuple[str, int, int]]:
        stats = ((path, Path(path).stat()) for path, _ in self.files(split))
        return [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]

    def unused(self) -> tuple[str, ...]:
        if self._train_root == self._root:
            return ()
        used = (self._train_root, self._test_root)
        entries = [entry for entry in sorted(self._root.iterdir()) if not is_ignored(entry.name) and entry not in used]
        return tuple(printable(entry) for entry in entries if entry.is_dir() or entry.suffix.lower() in SUFFIXES)

    def problems(self) -> tuple[str, ...]:
        """Return a sentence for each image without a class or in an unsupported format, and for each broken link."""
        roots = [self._train_root] if self._train_root == self._root else [self._train_root, self._test_root]
        return tuple(problem for root in roots for problem in _file_problems(root))

    @cached_property
    def _random_split(self) -> dict[Split, list[tuple[str, int]]]:
        files = self._list_files(self._root)
        num_test = round(self.options.test_fraction * len(files))
        if num_test == 0:
            raise DataError(
                f"data.source.test_fraction {self.options.test_fraction} of the {len(files)} images in {self._root} "
                f"leaves none for testing"
            )
        train, test = stratified_split([label for _, label in files], num_test, self.options.seed)
        return {"train": [files[i] for i in train], "test": [files[i] for i in test]}

    @cached_property
    def _test_files(self) -> list[tuple[str, int]]:
        files = self._list_files(self._test_root)
        train_targets = set(_real_paths(file for file, _ in self._list_files(self._train_root)))
        for (file, _), target in zip(files, _real_paths(file for file, _ in files), strict=True):
            if target in train_targets:
                raise DataError(f"{printable(file)} is an image of the training split too, by a link; remove the link")
        return files

    def _list_files(self, root: Path) -> list[tuple[str, int]]:
        files: list[tuple[str, int]] = []
        folder_of_target: dict[Path, Path] = {}
        for folder in _class_folders(root):
            name = _class_name(folder)
            if name not in self.classes:
                raise DataError(
                    f"{printable(folder)} is a class that {printable(self._train_root)} does not have; it has "
                    f"{first_names(self.classes)}"
                )
            label = self.classes.index(name)
            images = find_images(folder)
            for file, target in zip(images, _real_paths(images), strict=True):
                other = folder_of_target.get(target)
                if other is None:
                    folder_of_target[target] = folder
                    files.append((str(file), label))
                elif other != folder:  # otherwise it is a link to an image of the same class
                    raise DataError(
                        f"{printable(file)} is an image of {printable(other)} too, by a link; an image has one class"
                    )
        return files

    def num_images(self, split: Split) -> int:
        return len(self.files(split))

    def _read(self, split: Split) -> Iterator[Example]:
        items = ((printable(path), label, Path(path)) for path, label in self.files(split))
        return decode_all(items, size=self.size, channels=self.channels)


def _real_paths(files: Iterable[str | Path]) -> Iterator[Path]:
    """Yield the paths of files without links; each folder is resolved once."""
    resolve_folder = cache(Path.resolve)
    for file in map(Path, files):
        yield file.resolve() if file.is_symlink() else resolve_folder(file.parent) / file.name


def _class_folders(root: Path) -> list[Path]:
    """Return the folders in ``root``, sorted by class name; raises DataError for an image without a class."""
    entries = [entry for entry in root.iterdir() if not is_ignored(entry.name)]
    folders = sorted((entry for entry in entries if _is_folder(entry)), key=_class_name)
    loose = sorted(entry for entry in entries if not entry.is_dir() and is_image(entry))
    if not folders:
        hint = "; it holds images: is data.source.path one level too low?" if loose else ""
        raise DataError(f"{printable(root)} holds no folders, allowed is one per class{hint}")
    if loose:
        raise DataError(_outside_classes(loose[0]))
    targets: dict[Path, Path] = {}
    for folder in folders:
        first = targets.setdefault(folder.resolve(), folder)
        if first is not folder:
            raise DataError(f"{printable(first)} and {printable(folder)} are the same folder; remove the link")
    return folders


def _outside_classes(file: Path) -> str:
    return f"{printable(file)} is an image outside the class folders; move it into one, or away"


def _file_problems(root: Path) -> Iterator[str]:
    """A sentence for each file that a split's folder must not hold."""
    has_folders = any(map(_is_folder, root.iterdir()))  # otherwise the images are not the problem
    for file in walk_files(root):
        try:
            if is_image(file) and file.parent == root and has_folders:
                yield _outside_classes(file)
        except DataError as error:
            yield str(error)


def _check_splits(root: Path, folders: list[Path]) -> None:
    """Raise DataError if class folders contain split folders, as training would use test images."""
    parent = root.parent if root.name.lower() in TRAIN_NAMES else root
    for folder in folders:
        with os.scandir(folder) as entries:  # is_dir() needs no system call per file
            subfolders = [path for entry in entries if entry.is_dir() and _is_folder(path := Path(entry.path))]
        names = {subfolder.name.lower() for subfolder in subfolders if any(map(is_image, walk_files(subfolder)))}
        splits = names & {*TRAIN_NAMES, *TEST_NAMES}
        both = splits & set(TRAIN_NAMES) and splits & set(TEST_NAMES)
        if splits and (splits == names or both):
            raise DataError(
                f"{printable(folder)} holds {' and '.join(sorted(splits))}; split folders stand above class folders, "
                f"as in {printable(parent)}/train/{printable(folder.name)}"
            )


def _check_level(root: Path, folders: Sequence[Path]) -> None:
    """Raise DataError if all folders contain folders of the same names, which then are the real classes."""
    common_names: list[str] = []
    for folder in folders:
        names = _first_differing_names(_image_folders(folder))
        if not names or names != (common_names or names):
            return
        common_names = names
    raise DataError(
        f"the folders in {printable(root)} ({first_names(folder.name for folder in folders)}) hold no images but "
        f"folders of the same names ({first_names(common_names)}): is data.source.path one level too high? Allowed are "
        "class folders that hold images, or folders of different names"
    )


def _image_folders(folder: Path) -> list[tuple[str, ...]]:
    """Return the sorted relative paths of the folders that contain images; only () if ``folder`` itself does."""
    if any(is_image(entry) for entry in folder.iterdir() if not entry.is_dir() and not is_ignored(entry.name)):
        return [()]
    image_folders: set[tuple[str, ...]] = set()
    for file in walk_files(folder):
        parts = file.relative_to(folder).parts[:-1]
        if parts not in image_folders and is_image(file):
            image_folders.add(parts)
    return sorted(image_folders)


def _first_differing_names(paths: list[tuple[str, ...]]) -> list[str]:
    """Return the sorted names of the first level at which paths differ."""
    levels = (sorted(set(names)) for names in zip(*paths, strict=False))
    return next((names for names in levels if len(names) > 1), [])


def _is_folder(entry: Path) -> bool:
    """Whether an entry is a folder to read, which excludes links to a folder that contains the link."""
    return entry.is_dir() and not is_ignored(entry.name) and not links_to_ancestor(entry)


def _class_name(folder: Path) -> str:
    return unicodedata.normalize("NFC", folder.name)
