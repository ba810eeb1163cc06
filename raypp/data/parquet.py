"""Parquet files in the column layout of the Hugging Face hub, on a local disk or in object storage."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from pydantic import field_validator

from raypp.data.base import DataSource, Example, Labels, Split, check_names, decode_all
from raypp.utils import paths, registry
from raypp.utils.errors import DataError, first_line
from raypp.utils.image_files import DOWNLOADED, walk_files
from raypp.utils.images import printable

IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("label", "fine_label", "labels")
# The words by which the Hugging Face hub knows a split; validation serves as test where there is no test.
SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
}

SUFFIXES = (".parquet", ".parq", ".pq")
MAX_CLASSES = 100_000  # more come from a column that holds no labels
ROWS_AT_A_TIME = 64
INTEGER = re.compile(r"0|-?[1-9][0-9]*")
NO_VALUE = "__HIVE_DEFAULT_PARTITION__"


class RowGroup(NamedTuple):
    """A part of a file that is read at a time.

    Attributes:
        path: within the source's filesystem.
        number: of the row group in the file.
        first: its first row in the file.
        labels: int64, one per row.
    """

    path: str
    number: int
    first: int
    labels: Labels


class Parquet(DataSource):
    """Images and labels in Parquet files as on the Hugging Face hub; local or in object storage (s3://, gs://).

    A file belongs to the split whose name (train, test, validation) stands in its path. Images are encoded files in a
    binary column or in the ``bytes`` of a struct; labels are integers, or strings whose sorted names become classes. A
    label column that the files lack is read from folders such as ``label=cat``. Files and folders whose names begin
    with ``.`` or ``_`` are passed over, as Spark and pyarrow do, and so are files without rows.
    """

    class Options(registry.MethodConfig):
        """Where the files lie and which columns to read."""

        name: Literal["parquet"] = "parquet"
        path: paths.PathOrUri
        """Folder or file, or a URI of any filesystem that pyarrow knows."""
        image_column: str | None = None
        """None takes ``img`` or ``image``."""
        label_column: str | None = None
        """None takes ``label``, ``fine_label`` or ``labels``."""
        classes: tuple[str, ...] | None = None
        """Class names in label order, for files that do not carry them."""

        @field_validator("classes")
        @classmethod
        def _different(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
            if twice := sorted({name for name in names or () if (names or ()).count(name) > 1}):
                raise ValueError(f"{twice[0]!r} is given twice; allowed are names that differ")
            return names

    options: Options

    @cached_property
    def _location(self) -> tuple[pafs.FileSystem, str]:
        path = self.options.path
        if "://" not in path:
            return pafs.LocalFileSystem(), Path(path).as_posix()
        with _naming(path):
            filesystem, root = pafs.FileSystem.from_uri(path)
        return filesystem, root

    @property
    def filesystem(self) -> pafs.FileSystem:
        """The filesystem that the paths of :meth:`files` belong to."""
        return self._location[0]

    @cached_property
    def _files(self) -> dict[str, list[str]]:
        """Sorted paths by split word: train, test, validation; those without one under the empty word."""
        filesystem, root = self._location
        with _naming(self.options.path):
            info = filesystem.get_file_info(root)
            paths = [root] if info.type == pafs.FileType.File else sorted(self._all_files())
        found: dict[str, list[str]] = {}
        word_of: dict[str, str] = {}
        local = isinstance(filesystem, pafs.LocalFileSystem)
        for path in paths:
            parts = self._parts(path)
            if path != root and any(part.startswith((".", "_")) for part in parts):
                continue
            if path != root and not path.lower().endswith(SUFFIXES):
                _refuse_download(path)
                if any(f"{suffix}." in parts[-1].lower() for suffix in SUFFIXES):
                    found.setdefault("", []).append(path)
                continue
            # The last word counts: train/part-0.parquet is train, and so is test-of-time/train-0.parquet. The value in
            # label=test is a class.
            named = "/".join(part.lower() for part in parts if "=" not in part or part.lower().startswith("split="))
            words = [SPLIT_WORDS[w] for w in re.findall(r"[a-z]+", named) if w in SPLIT_WORDS]
            word = words[-1] if words else ""
            real = os.path.realpath(path) if local else path
            other = word_of.get(real) if word else None
            if other == word:
                continue  # a link to a file that is there already
            if other is not None and "train" in (word, other):
                raise DataError(f"{printable(path)} is a file of the {other} split too, by a link; remove the link")
            word_of[real] = word
            found.setdefault(word, []).append(path)
        return found

    def unused(self) -> tuple[str, ...]:
        splits = self._files
        validation = splits.get("validation", []) if "test" in splits else []
        return tuple(map(printable, sorted(splits.get("", []) + validation)))

    def _all_files(self) -> list[str]:
        """Every file below the path; raises DataError for a link that leads nowhere."""
        filesystem, root = self._location
        if not (isinstance(filesystem, pafs.LocalFileSystem) and Path(root).is_dir()):
            infos = filesystem.get_file_info(pafs.FileSelector(root, recursive=True))
            return [info.path for info in infos if info.is_file]
        files = list(walk_files(Path(root)))  # pyarrow follows links to folders that hold them, 40 deep
        for file in files:
            if not file.exists():
                raise DataError(f"{printable(file)} is a link to a file or folder that does not exist")
        return [file.as_posix() for file in files]

    def _parts(self, path: str) -> list[str]:
        """The names of the folders below the source's path, and the file's."""
        root = self._location[1]
        relative = path.rpartition("/")[2] if path == root else path[len(root) :]
        return relative.strip("/").split("/")

    def _partition(self, path: str) -> dict[str, str]:
        """Columns that folders of Hive's layout give a file, as in ``label=cat/part-0.parquet``; raises DataError for
        a column with two values."""
        columns: dict[str, str] = {}
        for part in self._parts(path)[:-1]:
            quoted, equals, value = part.partition("=")
            name = unquote(quoted)
            if equals and columns.setdefault(name, unquote(value)) != unquote(value):
                raise DataError(
                    f"{path}: two folders give column {name!r}, one {columns[name]!r}, one {unquote(value)!r}"
                )
        return columns

    def files(self, split: Split) -> list[str]:
        """Return the split's paths within :attr:`filesystem`, sorted; raises DataError if there are none."""
        found = self._files.get(split) or (self._files.get("validation") if split == "test" else None)
        if not found:
            others = [printable(path) for paths in self._files.values() for path in paths]
            listed = f"; it has {', '.join(others[:5])}{', ...' * (len(others) > 5)}" if others else ""
            raise DataError(f"{self.options.path} has no Parquet file with {split!r} in its name{listed}")
        return found

    @cached_property
    def _first(self) -> tuple[str, pa.Schema]:
        """Path and schema of the first training file that has rows, or of the first of all."""
        files = self.files("train")
        first = None
        for path in files:
            with self._open(path) as file:
                if file.metadata.num_rows:
                    return path, file.schema_arrow
                first = first or (path, file.schema_arrow)
        assert first is not None
        return first

    def columns(self) -> tuple[str, str]:
        """Return the names of the image and the label column; raises DataError if one cannot be found."""
        return (
            self._column("image_column", self.options.image_column, IMAGE_COLUMNS),
            self._column("label_column", self.options.label_column, LABEL_COLUMNS),
        )

    def _column(self, field: str, wanted: str | None, usual: tuple[str, ...]) -> str:
        path, schema = self._first
        names = list(schema.names)
        if field == "label_column":
            names += self._partition(path)
        for name in [wanted] if wanted else usual:
            if name in names:
                _refuse_twice(schema, name, path)
                return name
        if not names:
            raise DataError(f"{self.options.path} has no rows in its training files")
        tried = repr(wanted) if wanted else " or ".join(map(repr, usual))
        raise DataError(f"{path} has no column {tried}; set data.source.{field} to one of {', '.join(names)}")

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Class names: those in the file's Hugging Face metadata, else the option, else the labels themselves."""
        return check_names(self._class_names(), self._first[0])

    def _class_names(self) -> tuple[str, ...]:
        column = self.columns()[1]
        names = _names(self._first[1], column)
        given = self.options.classes
        if names and given and names != given:
            raise DataError(
                f"data.source.classes is {', '.join(given)}, but {self._first[0]} names its classes "
                f"{', '.join(names)}; leave the setting out"
            )
        if names or given:
            return names or given or ()
        columns = [values for path in self.files("train") if len(values := self._label_column(path))]
        if not columns:
            raise DataError(f"{self.options.path} has no rows in its training files")
        if _is_text(columns[0].type):
            return tuple(sorted({name for values in columns for name in values.unique().to_pylist()}))
        largest = max(pc.max(values).as_py() for values in columns)
        if largest >= MAX_CLASSES:
            raise DataError(
                f"{self.options.path}: the largest label in column {column!r} is {largest}, allowed is less than "
                f"{MAX_CLASSES}; set data.source.label_column or data.source.classes"
            )
        return tuple(map(str, range(largest + 1)))

    def labels(self, path: str) -> Labels:
        """Return the labels of one file, int64 (N,), each in 0..len(classes)-1.

        Raises:
            DataError: a label is null, out of range, an unknown name, or not an integer; or the file has strings where
                the training files have integers.
        """
        values = self._label_column(path)
        if not len(values):
            return np.empty(0, dtype=np.int64)
        with self._open(path) as file:
            names = _names(file.schema_arrow, self.columns()[1])
        if names is not None and names != self.classes:
            raise DataError(
                f"{path} names its classes {', '.join(names)}, the training files {', '.join(self.classes)}; the same "
                "number would mean another class"
            )
        if _is_text(values.type):
            indices = pc.index_in(values, pa.array(self.classes, values.type)).fill_null(-1)
        else:
            indices = values
        labels: Labels = indices.to_numpy().astype(np.int64)
        wrong = np.flatnonzero((labels < 0) | (labels >= len(self.classes)))
        if len(wrong):
            allowed = ", ".join(self.classes) if _is_text(values.type) else f"0 to {len(self.classes) - 1}"
            raise DataError(f"{path} row {wrong[0]}: label {values[wrong[0]].as_py()!r} is not one of {allowed}")
        return labels

    @cached_property
    def _labels_are_text(self) -> bool:
        """Whether the first training file with rows has strings for labels."""
        return _is_text(self._typed_labels(self._first[0]).type)

    def _label_column(self, path: str) -> pa.ChunkedArray:
        """Return the label column of one file: integers or strings as in the training files, none of them null."""
        values = self._typed_labels(path)
        column = self.columns()[1]
        if len(values) and _is_text(values.type) != self._labels_are_text:
            kinds = ("strings", "integers") if self._labels_are_text else ("integers", "strings")
            raise DataError(
                f"{path}: column {column!r} holds {kinds[1]} where {self._first[0]} holds {kinds[0]}; a number says "
                "nothing about the name"
            )
        return values

    def _typed_labels(self, path: str) -> pa.ChunkedArray:
        column = self.columns()[1]
        with self._open(path) as file, _naming(path):
            num = file.metadata.num_rows
            if not num:
                return pa.chunked_array([], pa.int64())
            partition = self._partition(path)
            if column in partition and column not in file.schema_arrow.names:
                return self._partition_labels(path, partition[column], num)
            _has(file, column, path)
            values = file.read([column]).column(column)
        if pa.types.is_dictionary(values.type):
            values = values.cast(values.type.value_type)
        if _is_text(values.type):
            values = values.cast(pa.large_string())
        elif not pa.types.is_integer(values.type):
            raise DataError(f"{path} row 0: label column {column!r} is {values.type}, allowed are integers and strings")
        if values.null_count:
            raise DataError(f"{path} row {pc.index(values.is_null(), True).as_py()}: label is null")
        return values

    def _partition_labels(self, path: str, value: str, num: int) -> pa.ChunkedArray:
        """The label of a file whose folder names it, as often as the file has rows."""
        if value in ("", NO_VALUE):
            raise DataError(f"{path} row 0: label is null")
        column = self.columns()[1]
        paths = [path for word, files in self._files.items() if word for path in files]
        values = [part[column] for path in paths if column in (part := self._partition(path))]
        if all(INTEGER.fullmatch(value) for value in values):
            return pa.chunked_array([pa.repeat(pa.scalar(int(value), pa.int64()), num)])
        return pa.chunked_array([pa.repeat(pa.scalar(value, pa.large_string()), num)])

    def num_images(self, split: Split) -> int:
        total = 0
        for path in self.files(split):
            with self._open(path) as file:
                total += file.metadata.num_rows
        return total

    def groups(self, split: Split) -> Iterator[RowGroup]:
        """Yield the row groups of ``split`` that have rows, with their labels; raises DataError for a label or column
        that is wrong."""
        column = self.columns()[0]
        for path in self.files(split):
            labels = self.labels(path)
            first = 0
            with self._open(path) as file:
                if not len(labels):  # such a file may have no columns either
                    continue
                _has(file, column, path)
                sizes = [file.metadata.row_group(index).num_rows for index in range(file.num_row_groups)]
            for index, num in enumerate(sizes):
                if num:
                    yield RowGroup(path, index, first, labels[first : first + num])
                first += num

    def read(self, group: RowGroup, column: str) -> Iterator[tuple[str, int, bytes | None]]:
        """Yield (name, label, encoded image) of each row of a group, few of them in memory at a time."""
        row = 0
        with self._open(group.path) as file, _naming(group.path):
            # pyarrow cannot cut arrays of views.
            views = "view" in str(file.schema_arrow.field(column).type)
            num = max(1, len(group.labels)) if views else ROWS_AT_A_TIME
            for batch in file.iter_batches(num, row_groups=[group.number], columns=[column]):
                for data in _image_bytes(batch.column(0), group.path, column):
                    yield f"{group.path} row {group.first + row}", int(group.labels[row]), data.as_py()
                    row += 1

    def _read(self, split: Split) -> Iterator[Example]:
        return decode_all(self._items(split), size=self.size, channels=self.channels)

    def _items(self, split: Split) -> Iterator[tuple[str, int, bytes | None]]:
        column = self.columns()[0]
        for group in self.groups(split):
            yield from self.read(group, column)

    @contextmanager
    def _open(self, path: str) -> Iterator[pq.ParquetFile]:
        with _naming(path):
            file = pq.ParquetFile(path, filesystem=self.filesystem)
        with file:
            yield file


@contextmanager
def _naming(path: str) -> Iterator[None]:
    """Turn what pyarrow raises for a missing or damaged file into a DataError that names it."""
    try:
        yield
    except UnicodeError as error:
        raise DataError(f"{path} holds a file or folder whose name is not UTF-8; rename it") from error
    except (OSError, pa.ArrowException) as error:
        reason = first_line(error)
        raise DataError(f"{path} cannot be read as Parquet ({reason})") from error


def _refuse_download(path: str) -> None:
    """Raise DataError for a Parquet file whose download was numbered or kept its query, as in train.parquet.1."""
    name = path.rpartition("/")[2]
    match = DOWNLOADED.search(name.lower())
    if match is not None and match[1] in SUFFIXES:
        raise DataError(
            f"{printable(path)} is a download under another name; rename it to {printable(name[: match.end(1)])}, or "
            "move it away if that file is there"
        )


def _names(schema: pa.Schema, column: str) -> tuple[str, ...] | None:
    """Class names in a file's Hugging Face metadata, or None: it is not from the hub, or its labels have no names."""
    try:
        metadata = json.loads((schema.metadata or {})[b"huggingface"])
        return tuple(map(str, metadata["info"]["features"][column]["names"]))
    except (KeyError, TypeError, ValueError):
        return None


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _image_bytes(chunk: Any, path: str, column: str) -> Any:
    """Return the binary array of a chunk of the image column, which is binary itself or a struct with ``bytes``."""
    if pa.types.is_struct(chunk.type) and chunk.type.get_field_index("bytes") >= 0:
        chunk = pc.struct_field(chunk, "bytes")
    if pa.types.is_dictionary(chunk.type):
        chunk = chunk.dictionary_decode()
    kind = chunk.type
    if not (
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_binary_view(kind)
        or pa.types.is_fixed_size_binary(kind)
    ):
        raise DataError(f"{path}: image column {column!r} is {kind}, allowed is binary or a struct with bytes")
    return chunk


def _has(file: pq.ParquetFile, column: str, path: str) -> None:
    if column not in file.schema_arrow.names:
        raise DataError(f"{path} has no column {column!r}; it has {', '.join(file.schema_arrow.names)}")
    _refuse_twice(file.schema_arrow, column, path)


def _refuse_twice(schema: pa.Schema, column: str, path: str) -> None:
    if schema.names.count(column) > 1:
        raise DataError(f"{path} has the column {column!r} twice; rename one of them")
