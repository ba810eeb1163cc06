"""Parquet files in the column layout of the Hugging Face hub, on a local disk or in object storage."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from pydantic import field_validator

from raypp import registry
from raypp.data.base import Labels, Record, Source, Split, decode_all
from raypp.errors import DataError, first_line

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

MAX_CLASSES = 100_000  # more come from a column that holds no labels


class Parquet(Source):
    """Images and labels in Parquet files as on the Hugging Face hub; local or in object storage (s3://, gs://).

    A file belongs to the split whose name (train, test, validation) stands in its path. Images are encoded files in a
    binary column or in the ``bytes`` of a struct; labels are integers, or strings whose sorted names become classes.
    """

    class Options(registry.Options):
        """Where the files lie and which columns to read."""

        name: Literal["parquet"] = "parquet"
        path: registry.Location
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
        """Sorted paths by split word: train, test, validation."""
        filesystem, root = self._location
        with _naming(self.options.path):
            info = filesystem.get_file_info(root)
            if info.type == pafs.FileType.File:
                paths = [root]
            else:
                infos = filesystem.get_file_info(pafs.FileSelector(root, recursive=True))
                paths = sorted(i.path for i in infos if i.is_file and i.path.endswith(".parquet"))
        found: dict[str, list[str]] = {}
        for path in paths:
            relative = path[len(root) :] if path != root else path.rpartition("/")[2]
            if "/." in relative:  # hidden, for instance a file manager's or a download cache's
                continue
            # The last word counts: train/part-0.parquet is train, and so is test-of-time/train-0.parquet.
            words = [SPLIT_WORDS[w] for w in re.findall(r"[a-z]+", relative.lower()) if w in SPLIT_WORDS]
            if words:
                found.setdefault(words[-1], []).append(path)
        return found

    def files(self, split: Split) -> list[str]:
        """Return the split's paths within :attr:`filesystem`, sorted; raises DataError if there are none."""
        found = self._files.get(split) or (self._files.get("validation") if split == "test" else None)
        if not found:
            raise DataError(f"{self.options.path} has no Parquet file with {split!r} in its name")
        return found

    @cached_property
    def _schema(self) -> pa.Schema:
        with self._open(self.files("train")[0]) as file:
            return file.schema_arrow

    def columns(self) -> tuple[str, str]:
        """Return the names of the image and the label column; raises DataError if one cannot be found."""
        return (
            self._column("image_column", self.options.image_column, IMAGE_COLUMNS),
            self._column("label_column", self.options.label_column, LABEL_COLUMNS),
        )

    def _column(self, field: str, wanted: str | None, usual: tuple[str, ...]) -> str:
        for name in [wanted] if wanted else usual:
            if name in self._schema.names:
                return name
        tried = repr(wanted) if wanted else " or ".join(map(repr, usual))
        raise DataError(
            f"{self.files('train')[0]} has no column {tried}; set data.source.{field} to one of "
            f"{', '.join(self._schema.names)}"
        )

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Class names: those in the file's Hugging Face metadata, else the option, else the labels themselves."""
        column = self.columns()[1]
        names = _names(self._schema, column)
        given = self.options.classes
        if names and given and names != given:
            raise DataError(
                f"data.source.classes is {', '.join(given)}, but {self.files('train')[0]} names its classes "
                f"{', '.join(names)}; leave the setting out"
            )
        if names or given:
            return names or given or ()
        columns = [self._label_column(path) for path in self.files("train")]
        if len({_is_text(values.type) for values in columns}) > 1:
            raise DataError(f"{self.options.path}: column {column!r} holds integers in one file and strings in another")
        if _is_text(columns[0].type):
            return tuple(sorted({name for values in columns for name in values.unique().to_pylist()}))
        largest = max((pc.max(values).as_py() for values in columns if len(values)), default=None)
        if largest is None or largest >= MAX_CLASSES:
            raise DataError(
                f"{self.options.path}: the largest label in column {column!r} is {largest}, allowed is less than "
                f"{MAX_CLASSES}; set data.source.label_column or data.source.classes"
            )
        return tuple(map(str, range(largest + 1)))

    def labels(self, path: str) -> Labels:
        """Return the labels of one file, int64 (N,), each in 0..len(classes)-1.

        Raises:
            DataError: a label is null, out of range, an unknown name, or not an integer.
        """
        values = self._label_column(path)
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

    def _label_column(self, path: str) -> pa.ChunkedArray:
        """Return the label column of one file: integers or strings, none of them null."""
        column = self.columns()[1]
        with self._open(path) as file, _naming(path):
            _has(file, column, path)
            values = file.read([column]).column(column)
        if pa.types.is_dictionary(values.type):
            values = values.cast(values.type.value_type)
        if not (_is_text(values.type) or pa.types.is_integer(values.type)):
            raise DataError(f"{path} row 0: label column {column!r} is {values.type}, allowed are integers and strings")
        if values.null_count:
            raise DataError(f"{path} row {pc.index(values.is_null(), True).as_py()}: label is null")
        return values

    def num_images(self, split: Split) -> int:
        total = 0
        for path in self.files(split):
            with self._open(path) as file:
                total += file.metadata.num_rows
        return total

    def _read(self, split: Split) -> Iterator[Record]:
        return decode_all(self._items(split), size=self.size, channels=self.channels)

    def _items(self, split: Split) -> Iterator[tuple[str, int, bytes | None]]:
        """Yield (name, label, encoded image), one row group in memory at a time."""
        column = self.columns()[0]
        for path in self.files(split):
            labels = self.labels(path)
            row = 0
            with self._open(path) as file:
                _has(file, column, path)
                for group in range(file.num_row_groups):
                    with _naming(path):
                        images = file.read_row_group(group, [column]).column(column)
                    for chunk in images.chunks:
                        for data in _image_bytes(chunk, path, column):
                            yield f"{path} row {row}", int(labels[row]), data.as_py()
                            row += 1

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
    except (OSError, pa.ArrowException) as error:
        reason = first_line(error)
        raise DataError(f"{path} cannot be read as Parquet ({reason})") from error


def _names(schema: pa.Schema, column: str) -> tuple[str, ...] | None:
    """Class names in a file's Hugging Face metadata, or None: it is not from the hub, or its labels have no names."""
    try:
        metadata = json.loads((schema.metadata or {})[b"huggingface"])
        return tuple(map(str, metadata["info"]["features"][column]["names"]))
    except (KeyError, TypeError, ValueError):
        return None


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _image_bytes(chunk: Any, path: str, column: str) -> Any:
    """Return the binary array of a chunk of the image column, which is binary itself or a struct with ``bytes``."""
    if pa.types.is_struct(chunk.type) and chunk.type.get_field_index("bytes") >= 0:
        chunk = pc.struct_field(chunk, "bytes")
    if not (pa.types.is_binary(chunk.type) or pa.types.is_large_binary(chunk.type)):
        raise DataError(f"{path}: image column {column!r} is {chunk.type}, allowed is binary or a struct with bytes")
    return chunk


def _has(file: pq.ParquetFile, column: str, path: str) -> None:
    if column not in file.schema_arrow.names:
        raise DataError(f"{path} has no column {column!r}; it has {', '.join(file.schema_arrow.names)}")
