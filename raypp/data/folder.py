"""A folder per class, any image format: the layout most people already have."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Literal

from pydantic import Field

from raypp.data.base import DataSource, Example, Split, check_names, decode_all, stratified_split
from raypp.utils import paths, registry
from raypp.utils.errors import DataError
from raypp.utils.image_files import contains_images, find_images, is_ignored, is_image, walk_files
from raypp.utils.images import SUFFIXES, printable

TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "testing", "val", "valid", "validation")


class Folder(DataSource):
    """Images in ``train/<class>/`` and ``test/<class>/``, or in ``<class>/`` alone; any image format.

    They may also be called ``training``, and ``testing``, ``val``, ``valid`` or ``validation``, in any case. Class
    folders without a train folder above them are split into train and test by ``test_fraction``. Hidden files and files
    that are no images are passed over; an image outside a class folder is refused, and so are class folders that hold
    splits, or class folders of the same names.
    """

    class Options(registry.MethodConfig):
        """Where the folders lie and how to split them."""

        name: Literal["folder"] = "folder"
        path: paths.PathOrUri
        """Folder above train and test, or above the class folders."""
        test_fraction: float = Field(default=0.1, gt=0, lt=1)
        """Share of each class set aside for testing where there is no train folder."""
        seed: int = Field(default=0, ge=0)
        """Decides which images those are."""

    options: Options

    @cached_property
    def _root(self) -> Path:
        root = Path(self.options.path)
        if not root.is_dir():
            path = str(self.options.path)
            instead = "; a URI is read by data.source.name parquet" if "://" in path else ""
            raise DataError(f"data.source.path {path} is not a folder{instead}")
        return root

    @cached_property
    def _train_root(self) -> Path:
        found = self._split_folder(TRAIN_NAMES)
        if found is not None:
            return found
        test = self._split_folder(TEST_NAMES)
        if test is not None and any(entry.is_dir() for entry in test.iterdir()):  # else it is a class of that name
            raise DataError(f"{self._root} has a folder {test.name} and none for training, allowed is {TRAIN_NAMES[0]}")
        return self._root

    def _split_folder(self, names: tuple[str, ...]) -> Path | None:
        """The folder inside that is called so, in whatever case; raises DataError if there are two of one name."""
        folders = [entry for entry in sorted(self._root.iterdir()) if entry.is_dir()]
        for name in names:
            found = [folder for folder in folders if folder.name.lower() == name]
            if len(found) > 1:
                raise DataError(f"{self._root} has both {found[0].name} and {found[1].name}; rename one of them")
            if found:
                return found[0]
        return None

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Names of the class folders, sorted; raises DataError if there are fewer than two, or two look the same."""
        root = self._train_root
        folders = _class_folders(root)
        if len(folders) == 1:
            inside = [printable(entry.name) for entry in sorted(folders[0].iterdir()) if _is_folder(entry)]
            hint = f"; it holds {', '.join(inside[:5])}: is data.source.path one level too high?" if inside else ""
            raise DataError(
                f"{printable(root)} has the single class folder {printable(folders[0].name)!r}, allowed are two or "
                f"more{hint}"
            )
        _check_splits(root, folders)
        _check_level(root, folders)
        return check_names(map(_class_name, folders), printable(root))

    def files(self, split: Split) -> list[tuple[str, int]]:
        """Return (path, label) of every image of ``split``, sorted by class and path.

        Raises:
            DataError: there is no such split, a class folder has no image, or test has a class that train lacks.
        """
        if self._train_root == self._root:
            return self._divided[split]
        return self._listed(self._train_root) if split == "train" else self._test_files

    @property
    def _test_root(self) -> Path:
        if (found := self._split_folder(TEST_NAMES)) is not None:
            return found
        raise DataError(f"{self._root} has a train folder and no test folder, allowed is {', '.join(TEST_NAMES)}")

    def unused(self) -> tuple[str, ...]:
        if self._train_root == self._root:
            return ()
        read = (self._train_root, self._test_root)
        entries = [entry for entry in sorted(self._root.iterdir()) if not is_ignored(entry.name) and entry not in read]
        return tuple(printable(entry) for entry in entries if entry.is_dir() or entry.suffix.lower() in SUFFIXES)

    @cached_property
    def _divided(self) -> dict[Split, list[tuple[str, int]]]:
        files = self._listed(self._root)
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
        files = self._listed(self._test_root)
        trained = set(_real_paths(Path(file) for file, _ in self._listed(self._train_root)))
        for (file, _), real in zip(files, _real_paths(Path(file) for file, _ in files), strict=True):
            if real in trained:
                raise DataError(f"{printable(file)} is an image of the training split too, by a link; remove the link")
        return files

    def _listed(self, root: Path) -> list[tuple[str, int]]:
        files: list[tuple[str, int]] = []
        holder: dict[Path, Path] = {}
        for folder in _class_folders(root):
            name = _class_name(folder)
            if name not in self.classes:
                raise DataError(
                    f"{printable(folder)} is a class that {printable(self._train_root)} does not have; it has "
                    f"{', '.join(self.classes[:5])}{', ...' * (len(self.classes) > 5)}"
                )
            label = self.classes.index(name)
            images = find_images(folder)
            for file, real in zip(images, _real_paths(images), strict=True):
                if holder.get(real) == folder:
                    continue  # a link to an image of the same class
                other = holder.setdefault(real, folder)
                if other != folder:
                    raise DataError(
                        f"{printable(file)} is an image of {printable(other)} too, by a link; an image has one class"
                    )
                files.append((str(file), label))
        return files

    def num_images(self, split: Split) -> int:
        return len(self.files(split))

    def _read(self, split: Split) -> Iterator[Example]:
        items = ((printable(path), label, Path(path)) for path, label in self.files(split))
        return decode_all(items, size=self.size, channels=self.channels)


def _real_paths(files: Iterable[Path]) -> Iterator[Path]:
    """Where files lie when all links are followed; each folder is looked up once."""
    folders: dict[Path, Path] = {}
    for file in files:
        if file.parent not in folders:
            folders[file.parent] = file.parent.resolve()
        yield file.resolve() if file.is_symlink() else folders[file.parent] / file.name


def _class_folders(root: Path) -> list[Path]:
    """The folders in ``root``, sorted by class name; raises DataError for what has no class."""
    entries = [entry for entry in root.iterdir() if not is_ignored(entry.name)]
    folders = sorted((entry for entry in entries if _is_folder(entry)), key=_class_name)
    loose = sorted(entry for entry in entries if not entry.is_dir() and is_image(entry))
    if not folders:
        hint = "; it holds images: is data.source.path one level too low?" if loose else ""
        raise DataError(f"{printable(root)} holds no folders, allowed is one per class{hint}")
    if loose:
        raise DataError(f"{printable(loose[0])} is an image outside the class folders; move it into one, or away")
    targets: dict[Path, Path] = {}
    for folder in folders:
        first = targets.setdefault(folder.resolve(), folder)
        if first is not folder:
            raise DataError(f"{printable(first)} and {printable(folder)} are the same folder; remove the link")
    return folders


def _check_splits(root: Path, folders: list[Path]) -> None:
    """Raise DataError if class folders hold split folders: images for testing would be trained on."""
    above = root.parent if root.name.lower() in TRAIN_NAMES else root
    for folder in folders:
        with os.scandir(folder) as entries:  # which knows folders without looking each file up
            inside = [path for entry in entries if entry.is_dir() and _is_folder(path := Path(entry.path))]
        names = {entry.name.lower() for entry in inside if any(map(is_image, walk_files(entry)))}
        splits = names & {*TRAIN_NAMES, *TEST_NAMES}
        both = splits & set(TRAIN_NAMES) and splits & set(TEST_NAMES)
        if splits and (splits == names or both):
            raise DataError(
                f"{printable(folder)} holds {' and '.join(sorted(splits))}; split folders stand above class folders, "
                f"as in {printable(above)}/train/{printable(folder.name)}"
            )


def _check_level(root: Path, folders: list[Path]) -> None:
    """Raise DataError if what look like class folders hold the class folders: the labels would be wrong."""
    names_of_first: list[str] | None = None
    for folder in folders:
        names_inside = _first_names(_image_places(folder))
        if not names_inside or (names_of_first is not None and names_inside != names_of_first):
            return
        names_of_first = names_inside
    if len(folders) > 1 and names_of_first:
        raise DataError(
            f"the folders in {printable(root)} ({_listing([folder.name for folder in folders])}) hold no images but "
            f"folders of the same names ({_listing(names_of_first)}): is data.source.path one level too high? Allowed "
            "are class folders that hold images, or folders of different names"
        )


def _image_places(folder: Path) -> list[tuple[str, ...]]:
    """Below a folder, the sorted paths of those that hold images themselves; only () if it does so itself."""
    if any(is_image(entry) for entry in folder.iterdir() if not entry.is_dir() and not is_ignored(entry.name)):
        return [()]
    places: set[tuple[str, ...]] = set()
    for file in walk_files(folder):
        place = file.relative_to(folder).parts[:-1]
        if place not in places and is_image(file):
            places.add(place)
    return sorted(places)


def _first_names(places: list[tuple[str, ...]]) -> list[str]:
    """The names of the first level at which folders differ."""
    for names in zip(*places, strict=False):
        if len(set(names)) > 1:
            return sorted(set(names))
    return []


def _listing(names: list[str]) -> str:
    return ", ".join(map(printable, names[:5])) + ", ..." * (len(names) > 5)


def _is_folder(entry: Path) -> bool:
    """Whether an entry is a folder to read: a link to a folder that holds the link is none."""
    return entry.is_dir() and not is_ignored(entry.name) and not (entry.is_symlink() and contains_images(entry, entry))


def _class_name(folder: Path) -> str:
    return unicodedata.normalize("NFC", folder.name)
