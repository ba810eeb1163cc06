"""The layout of a Parquet data set: which files belong to which split, and the columns in folder names."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from raypp.data.base import Split, first_names
from raypp.utils.errors import DataError, first_line
from raypp.utils.image_files import DOWNLOADED, walk_files
from raypp.utils.images import printable

# Names of splits on the Hugging Face hub. Validation is the test split if there is no test.
SPLIT_WORDS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLIT_WORDS |= dict.fromkeys(("val", "valid", "validation"), "validation")
SUFFIXES = (".parquet", ".parq", ".pq")


@dataclass
class ParquetFiles:
    """The Parquet files of a data set, local or in object storage."""

    path: str
    """Folder or file, or a URI of any filesystem that pyarrow knows."""

    @cached_property
    def _location(self) -> tuple[pafs.FileSystem, str]:
        if "://" not in self.path:
            return pafs.LocalFileSystem(), Path(self.path).as_posix()
        with pyarrow_errors(self.path):
            filesystem, root = pafs.FileSystem.from_uri(self.path)
        return filesystem, root

    @property
    def _is_local(self) -> bool:
        return isinstance(self._location[0], pafs.LocalFileSystem)

    def files(self, split: Split) -> list[str]:
        """Return the sorted paths of a split within the filesystem; raises DataError if there are none."""
        files = self._by_word.get(split) or (self._by_word.get("validation") if split == "test" else None)
        if not files:
            others = [path for paths in self._by_word.values() for path in paths]
            listed = f"; it has {first_names(others)}" if others else ""
            raise DataError(f"{self.path} has no Parquet file with {split!r} in its name{listed}")
        return files

    def versions(self, split: Split) -> list[tuple[str, int, int]]:
        """Return path, bytes and time of the last change (ns) of each file of a split."""
        with pyarrow_errors(self.path):
            infos = self._location[0].get_file_info(self.files(split))
        return [(info.path, info.size, info.mtime_ns or 0) for info in infos]

    def files_of_splits(self) -> list[str]:
        """Return the paths of all splits, also of a validation split next to a test split."""
        return [path for word, paths in self._by_word.items() if word for path in paths]

    def unused(self) -> tuple[str, ...]:
        """Return the paths of Parquet files that belong to no split."""
        validation = self._by_word.get("validation", []) if "test" in self._by_word else []
        return tuple(map(printable, sorted(self._by_word.get("", []) + validation)))

    @contextmanager
    def open(self, path: str) -> Iterator[pq.ParquetFile]:
        with pyarrow_errors(path):
            file = pq.ParquetFile(path, filesystem=self._location[0])
        with file:
            yield file

    @cached_property
    def first(self) -> tuple[str, pa.Schema]:
        """Path and schema of the first training file that has rows, or of the first one if none has."""
        first = None
        for path in self.files("train"):
            with self.open(path) as file:
                if file.metadata.num_rows:
                    return path, file.schema_arrow
                first = first or (path, file.schema_arrow)
        assert first is not None
        return first

    def partition(self, path: str) -> dict[str, str]:
        """Return the columns in folder names such as ``label=cat`` (Hive); raises DataError for one with two values."""
        columns: dict[str, str] = {}
        for part in self._parts(path)[:-1]:
            name, equals, value = (unquote(text) for text in part.partition("="))
            if equals and columns.setdefault(name, value) != value:
                raise DataError(f"{path}: two folders give column {name!r}, one {columns[name]!r}, one {value!r}")
        return columns

    @cached_property
    def _by_word(self) -> dict[str, list[str]]:
        """Sorted paths by train, test and validation; files of no split are under the empty word."""
        filesystem, root = self._location
        with pyarrow_errors(self.path):
            is_file = filesystem.get_file_info(root).type == pafs.FileType.File
            paths = [root] if is_file else sorted(self._list_files())
        paths_by_word: dict[str, list[str]] = {}
        word_of_target: dict[str, str] = {}
        for path in paths:
            word = self._split_word(path)
            if word is None:
                continue
            target = os.path.realpath(path) if self._is_local else path
            other = word_of_target.get(target) if word else None
            if other == word:
                continue  # a link to a file that is in the list
            if other is not None and "train" in (word, other):
                raise DataError(f"{printable(path)} is a file of the {other} split too, by a link; remove the link")
            if word:
                word_of_target[target] = word
            paths_by_word.setdefault(word, []).append(path)
        return paths_by_word

    def _split_word(self, path: str) -> str | None:
        """Return the split in a file's path, the empty word if there is none, or None for a file to skip."""
        parts = self._parts(path)
        if path != self._location[1]:
            if any(part.startswith((".", "_")) for part in parts):
                return None
            if not path.lower().endswith(SUFFIXES):
                _check_download(path)
                return "" if any(f"{suffix}." in parts[-1].lower() for suffix in SUFFIXES) else None
        # The last word counts: train/part-0.parquet is train, and so is test-of-time/train-0.parquet. The value in
        # label=test is a class.
        names = "/".join(part.lower() for part in parts if "=" not in part or part.lower().startswith("split="))
        words = [SPLIT_WORDS[word] for word in re.findall(r"[a-z]+", names) if word in SPLIT_WORDS]
        return words[-1] if words else ""

    def _list_files(self) -> list[str]:
        """Return every file below the path; raises DataError for a broken link."""
        filesystem, root = self._location
        if not (self._is_local and Path(root).is_dir()):
            infos = filesystem.get_file_info(pafs.FileSelector(root, recursive=True))
            return [info.path for info in infos if info.is_file]
        files = list(walk_files(Path(root)))  # pyarrow would follow links to their own parent folders 40 times
        for file in files:
            if not file.exists():
                raise DataError(f"{printable(file)} is a link to a file or folder that does not exist")
        return [file.as_posix() for file in files]

    def _parts(self, path: str) -> list[str]:
        """Return the names of the folders below the data set's path, and the file's name."""
        root = self._location[1]
        relative = path.rpartition("/")[2] if path == root else path[len(root) :]
        return relative.strip("/").split("/")


@contextmanager
def pyarrow_errors(path: str) -> Iterator[None]:
    """Convert pyarrow's errors for a missing or damaged file into a DataError that names the file."""
    try:
        yield
    except UnicodeError as error:
        raise DataError(f"{path} holds a file or folder whose name is not UTF-8; rename it") from error
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read as Parquet ({first_line(error)})") from error


def _check_download(path: str) -> None:
    """Raise DataError for a download with a number or query in its name, as in train.parquet.1."""
    name = path.rpartition("/")[2]
    match = DOWNLOADED.search(name.lower())
    if match is not None and match[1] in SUFFIXES:
        raise DataError(
            f"{printable(path)} is a download under another name; rename it to {printable(name[: match.end(1)])}, or "
            "move it away if that file is there"
        )
