"""Parquet files in the column layout of the Hugging Face hub, on a local disk or in object storage."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import field_validator

from raypp.data.base import DataSource, Example, Labels, Split, check_names, decode_all
from raypp.data.parquet_layout import ParquetFiles, pyarrow_errors
from raypp.utils import paths, registry
from raypp.utils.errors import DataError

IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("label", "fine_label", "labels")
ROWS_AT_A_TIME = 64
MAX_CLASSES = 100_000  # a larger label shows that the column holds no labels
INTEGER = re.compile(r"0|-?[1-9][0-9]*")
HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"
BINARY_KINDS = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary)


class RowGroup(NamedTuple):
    """The part of a file that is read at a time."""

    path: str
    """Within the source's filesystem."""
    number: int
    """Index of the row group in the file."""
    first: int
    """Its first row in the file."""
    labels: Labels
    """One per row."""


class Parquet(DataSource):
    """Images and labels in Parquet files as on the Hugging Face hub; local or in object storage (s3://, gs://).

    A file belongs to the split in its path (train, test, validation). Images are encoded files in a binary column or
    in the ``bytes`` of a struct. Labels are integers, or strings whose sorted names become classes. If the files have
    no label column, folders such as ``label=cat`` replace it. Like Spark and pyarrow, the source skips files and
    folders whose names begin with ``.`` or ``_``. It also skips files without rows.
    """

    class Options(registry.MethodConfig):
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
        def _check_unique(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
            if duplicates := sorted({name for name in names or () if (names or ()).count(name) > 1}):
                raise ValueError(f"{duplicates[0]!r} is given twice; allowed are names that differ")
            return names

    options: Options

    def __init__(self, options: Options, *, size: tuple[int, int] | None = None, channels: int = 3) -> None:
        super().__init__(options, size=size, channels=channels)
        self._files = ParquetFiles(options.path)

    def files(self, split: Split) -> list[str]:
        """Return the sorted paths of a split within the source's filesystem; raises DataError if there are none."""
        return self._files.files(split)

    def versions(self, split: Split) -> list[tuple[str, int, int]]:
        return self._files.versions(split)

    def unused(self) -> tuple[str, ...]:
        return self._files.unused()

    def columns(self) -> tuple[str, str]:
        """Return the names of the image and the label column; raises DataError if there is none."""
        path, schema = self._files.first
        image = self._find_column("image_column", IMAGE_COLUMNS, schema.names)
        return image, self._find_column("label_column", LABEL_COLUMNS, [*schema.names, *self._files.partition(path)])

    def _find_column(self, option: str, defaults: tuple[str, ...], names: list[str]) -> str:
        """Return the value of ``option``, or the first default in ``names``; raises DataError for neither."""
        path, schema = self._files.first
        name: str | None = getattr(self.options, option)
        for candidate in [name] if name else defaults:
            if candidate in names:
                _check_unique(schema, candidate, path)
                return candidate
        if not names:
            raise DataError(f"{self.options.path} has no rows in its training files")
        tried = repr(name) if name else " or ".join(map(repr, defaults))
        raise DataError(f"{path} has no column {tried}; set data.source.{option} to one of {', '.join(names)}")

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Class names from the file's Hugging Face metadata, the option, or the labels themselves, in this order."""
        path, schema = self._files.first
        names, option = _metadata_names(schema, self.columns()[1]), self.options.classes
        if names and option and names != option:
            raise DataError(
                f"data.source.classes is {', '.join(option)}, but {path} names its classes {', '.join(names)}; leave "
                "the setting out"
            )
        return check_names(names or option or self._names_from_labels(), path)

    def _names_from_labels(self) -> tuple[str, ...]:
        columns = [values for path in self.files("train") if len(values := self._read_labels(path))]
        if not columns:
            raise DataError(f"{self.options.path} has no rows in its training files")
        if self._are_text:
            return tuple(sorted({name for values in columns for name in values.unique().to_pylist()}))
        largest = max(pc.max(values).as_py() for values in columns)
        if largest >= MAX_CLASSES:
            raise DataError(
                f"{self.options.path}: the largest label in column {self.columns()[1]!r} is {largest}, allowed is less "
                f"than {MAX_CLASSES}; set data.source.label_column or data.source.classes"
            )
        return tuple(map(str, range(largest + 1)))

    def num_images(self, split: Split) -> int:
        total = 0
        for path in self.files(split):
            with self._files.open(path) as file:
                total += file.metadata.num_rows
        return total

    def groups(self, split: Split) -> Iterator[RowGroup]:
        """Yield the row groups of ``split`` that have rows; raises DataError for an invalid label or column."""
        column = self.columns()[0]
        for path in self.files(split):
            labels = self._labels(path)
            first = 0
            with self._files.open(path) as file:
                if not len(labels):  # such a file may have no columns either
                    continue
                _check_column(file.schema_arrow, column, path)
                sizes = [file.metadata.row_group(index).num_rows for index in range(file.num_row_groups)]
            for index, num in enumerate(sizes):
                if num:
                    yield RowGroup(path, index, first, labels[first : first + num])
                first += num

    def read(self, group: RowGroup) -> Iterator[tuple[str, int, bytes | None]]:
        """Yield (name, label, encoded image) of each row of a group, with few rows in memory at a time."""
        row, column = 0, self.columns()[0]
        with self._files.open(group.path) as file, pyarrow_errors(group.path):
            # pyarrow cannot slice arrays of views.
            has_views = "view" in str(file.schema_arrow.field(column).type)
            num = max(1, len(group.labels)) if has_views else ROWS_AT_A_TIME
            for batch in file.iter_batches(num, row_groups=[group.number], columns=[column]):
                for data in _binary_array(batch.column(0), group.path, column):
                    yield f"{group.path} row {group.first + row}", int(group.labels[row]), data.as_py()
                    row += 1

    def _read(self, split: Split) -> Iterator[Example]:
        items = (item for group in self.groups(split) for item in self.read(group))
        return decode_all(items, size=self.size, channels=self.channels)

    def _labels(self, path: str) -> Labels:
        """Return the labels of one file, int64 (N,), each in 0..len(classes)-1; raises DataError for any other."""
        values = self._read_labels(path)
        if not len(values):
            return np.empty(0, dtype=np.int64)
        with self._files.open(path) as file:
            names = _metadata_names(file.schema_arrow, self.columns()[1])
        if names is not None and names != self.classes:
            raise DataError(
                f"{path} names its classes {', '.join(names)}, the training files {', '.join(self.classes)}; the same "
                "number would mean another class"
            )
        indices = pc.index_in(values, pa.array(self.classes, values.type)).fill_null(-1) if self._are_text else values
        labels: Labels = indices.to_numpy().astype(np.int64)
        wrong = np.flatnonzero((labels < 0) | (labels >= len(self.classes)))
        if len(wrong):
            allowed = ", ".join(self.classes) if self._are_text else f"0 to {len(self.classes) - 1}"
            raise DataError(f"{path} row {wrong[0]}: label {values[wrong[0]].as_py()!r} is not one of {allowed}")
        return labels

    def _read_labels(self, path: str) -> pa.ChunkedArray:
        """Return the labels of one file: integers or strings as in the training files, none of them null."""
        values = self._read_any_labels(path)
        if len(values) and _is_text(values.type) != self._are_text:
            kinds = ("strings", "integers") if self._are_text else ("integers", "strings")
            raise DataError(
                f"{path}: column {self.columns()[1]!r} holds {kinds[1]} where {self._files.first[0]} holds {kinds[0]}; "
                "use one type, as a number does not identify a name"
            )
        return values

    @cached_property
    def _are_text(self) -> bool:
        """Whether the labels of the first training file with rows are strings."""
        return _is_text(self._read_any_labels(self._files.first[0]).type)

    def _read_any_labels(self, path: str) -> pa.ChunkedArray:
        """Return the labels of one file, integers or strings, none of them null."""
        column = self.columns()[1]
        with self._files.open(path) as file, pyarrow_errors(path):
            num = file.metadata.num_rows
            if not num:
                return pa.chunked_array([], pa.int64())
            partition = self._files.partition(path)
            if column in partition and column not in file.schema_arrow.names:
                return self._repeat_partition_label(path, partition[column], num)
            _check_column(file.schema_arrow, column, path)
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

    def _repeat_partition_label(self, path: str, value: str, num: int) -> pa.ChunkedArray:
        """Return ``num`` times the label in a file's folder name, as integers if the labels of all files are."""
        if value in ("", HIVE_NULL):
            raise DataError(f"{path} row 0: label is null")
        column = self.columns()[1]
        partitions = map(self._files.partition, self._files.files_of_splits())
        is_integer = all(INTEGER.fullmatch(partition[column]) for partition in partitions if column in partition)
        label = pa.scalar(int(value), pa.int64()) if is_integer else pa.scalar(value, pa.large_string())
        return pa.chunked_array([pa.repeat(label, num)])


def _check_column(schema: pa.Schema, column: str, path: str) -> None:
    if column not in schema.names:
        raise DataError(f"{path} has no column {column!r}; it has {', '.join(schema.names)}")
    _check_unique(schema, column, path)


def _check_unique(schema: pa.Schema, column: str, path: str) -> None:
    if schema.names.count(column) > 1:
        raise DataError(f"{path} has the column {column!r} twice; rename one of them")


def _metadata_names(schema: pa.Schema, column: str) -> tuple[str, ...] | None:
    """Return the class names in a file's Hugging Face metadata, or None if it has none."""
    try:
        metadata = json.loads((schema.metadata or {})[b"huggingface"])
        return tuple(map(str, metadata["info"]["features"][column]["names"]))
    except (KeyError, TypeError, ValueError):
        return None


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _binary_array(array: Any, path: str, column: str) -> Any:
    """Return the encoded images of a part of the image column, which is binary or a struct with ``bytes``."""
    if pa.types.is_struct(array.type) and array.type.get_field_index("bytes") >= 0:
        array = pc.struct_field(array, "bytes")
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if not any(is_kind(array.type) for is_kind in BINARY_KINDS):
        raise DataError(f"{path}: image column {column!r} is {array.type}, allowed is binary or a struct with bytes")
    return array
