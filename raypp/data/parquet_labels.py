"""The columns, class names and labels of a Parquet data set."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raypp.data.base import Labels, check_names
from raypp.data.parquet_layout import ParquetFiles, pyarrow_errors
from raypp.utils.errors import DataError

LABEL_COLUMNS = ("label", "fine_label", "labels")
MAX_CLASSES = 100_000  # a larger label shows that the column holds no labels
INTEGER = re.compile(r"0|-?[1-9][0-9]*")
HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"


@dataclass
class ParquetLabels:
    """Class names and labels of Parquet files.

    Args:
        files: the files of the data set.
        label_column: name of the column; None takes the first of LABEL_COLUMNS that exists.
        class_names: class names in label order for files without them, or None.
    """

    files: ParquetFiles
    label_column: str | None = None
    class_names: tuple[str, ...] | None = None

    @cached_property
    def column(self) -> str:
        """Name of the label column; raises DataError if there is none."""
        path, schema = self.files.first
        names = [*schema.names, *self.files.partition(path)]
        return find_column(self.files, names, "label_column", self.label_column, LABEL_COLUMNS)

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Class names from the file's Hugging Face metadata, the option, or the labels themselves, in this order."""
        path, schema = self.files.first
        names, option = _metadata_names(schema, self.column), self.class_names
        if names and option and names != option:
            raise DataError(
                f"data.source.classes is {', '.join(option)}, but {path} names its classes {', '.join(names)}; leave "
                "the setting out"
            )
        return check_names(names or option or self._names_from_labels(), path)

    def labels(self, path: str) -> Labels:
        """Return the labels of one file, int64 (N,), each in 0..len(classes)-1.

        Raises:
            DataError: a label is null, out of range, an unknown name, or not an integer; or the file has strings where
                the training files have integers.
        """
        values = self._read_column(path)
        if not len(values):
            return np.empty(0, dtype=np.int64)
        with self.files.open(path) as file:
            names = _metadata_names(file.schema_arrow, self.column)
        if names is not None and names != self.classes:
            raise DataError(
                f"{path} names its classes {', '.join(names)}, the training files {', '.join(self.classes)}; the same "
                "number would mean another class"
            )
        if is_text := _is_text(values.type):
            indices = pc.index_in(values, pa.array(self.classes, values.type)).fill_null(-1)
        labels: Labels = (indices if is_text else values).to_numpy().astype(np.int64)
        wrong = np.flatnonzero((labels < 0) | (labels >= len(self.classes)))
        if len(wrong):
            allowed = ", ".join(self.classes) if is_text else f"0 to {len(self.classes) - 1}"
            raise DataError(f"{path} row {wrong[0]}: label {values[wrong[0]].as_py()!r} is not one of {allowed}")
        return labels

    def _names_from_labels(self) -> tuple[str, ...]:
        columns = [values for path in self.files.files("train") if len(values := self._read_column(path))]
        if not columns:
            raise DataError(f"{self.files.path} has no rows in its training files")
        if _is_text(columns[0].type):
            return tuple(sorted({name for values in columns for name in values.unique().to_pylist()}))
        largest = max(pc.max(values).as_py() for values in columns)
        if largest >= MAX_CLASSES:
            raise DataError(
                f"{self.files.path}: the largest label in column {self.column!r} is {largest}, allowed is less than "
                f"{MAX_CLASSES}; set data.source.label_column or data.source.classes"
            )
        return tuple(map(str, range(largest + 1)))

    def _read_column(self, path: str) -> pa.ChunkedArray:
        """Return the labels of one file: integers or strings as in the training files, none of them null."""
        values = self._read_any_type(path)
        if len(values) and _is_text(values.type) != self._are_text:
            kinds = ("strings", "integers") if self._are_text else ("integers", "strings")
            raise DataError(
                f"{path}: column {self.column!r} holds {kinds[1]} where {self.files.first[0]} holds {kinds[0]}; use "
                "one type, as a number does not identify a name"
            )
        return values

    @cached_property
    def _are_text(self) -> bool:
        """Whether the labels of the first training file with rows are strings."""
        return _is_text(self._read_any_type(self.files.first[0]).type)

    def _read_any_type(self, path: str) -> pa.ChunkedArray:
        with self.files.open(path) as file, pyarrow_errors(path):
            num = file.metadata.num_rows
            if not num:
                return pa.chunked_array([], pa.int64())
            partition = self.files.partition(path)
            if self.column in partition and self.column not in file.schema_arrow.names:
                return self._repeat_partition_label(path, partition[self.column], num)
            check_column(file.schema_arrow, self.column, path)
            values = file.read([self.column]).column(self.column)
        if pa.types.is_dictionary(values.type):
            values = values.cast(values.type.value_type)
        if _is_text(values.type):
            values = values.cast(pa.large_string())
        elif not pa.types.is_integer(values.type):
            raise DataError(
                f"{path} row 0: label column {self.column!r} is {values.type}, allowed are integers and strings"
            )
        if values.null_count:
            raise DataError(f"{path} row {pc.index(values.is_null(), True).as_py()}: label is null")
        return values

    def _repeat_partition_label(self, path: str, value: str, num: int) -> pa.ChunkedArray:
        """Return ``num`` times the label in a file's folder name, as integers if the labels of all files are."""
        if value in ("", HIVE_NULL):
            raise DataError(f"{path} row 0: label is null")
        partitions = map(self.files.partition, self.files.files_of_splits())
        values = [partition[self.column] for partition in partitions if self.column in partition]
        is_integer = all(map(INTEGER.fullmatch, values))
        label = pa.scalar(int(value), pa.int64()) if is_integer else pa.scalar(value, pa.large_string())
        return pa.chunked_array([pa.repeat(label, num)])


def find_column(files: ParquetFiles, names: list[str], option: str, name: str | None, defaults: tuple[str, ...]) -> str:
    """Return ``name``, the value of ``option``, or the first default in ``names``; raises DataError for neither."""
    path, schema = files.first
    for candidate in [name] if name else defaults:
        if candidate in names:
            _check_unique(schema, candidate, path)
            return candidate
    if not names:
        raise DataError(f"{files.path} has no rows in its training files")
    tried = repr(name) if name else " or ".join(map(repr, defaults))
    raise DataError(f"{path} has no column {tried}; set data.source.{option} to one of {', '.join(names)}")


def check_column(schema: pa.Schema, column: str, path: str) -> None:
    """Raise DataError if a file has no such column, or two."""
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
