"""Parquet files in the column layout of the Hugging Face hub, on a local disk or in object storage."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import field_validator

from raypp.data.base import DataSource, Example, Labels, Split, decode_all
from raypp.data.parquet_labels import ParquetLabels, check_column, find_column
from raypp.data.parquet_layout import ParquetFiles, pyarrow_errors
from raypp.utils import paths, registry
from raypp.utils.errors import DataError

IMAGE_COLUMNS = ("img", "image")
ROWS_AT_A_TIME = 64


class RowGroup(NamedTuple):
    """The part of a file that is read at a time.

    Attributes:
        path: within the source's filesystem.
        number: index of the row group in the file.
        first: its first row in the file.
        labels: int64, one per row.
    """

    path: str
    number: int
    first: int
    labels: Labels


class Parquet(DataSource):
    """Images and labels in Parquet files as on the Hugging Face hub; local or in object storage (s3://, gs://).

    A file belongs to the split in its path (train, test, validation). Images are encoded files in a binary column or
    in the ``bytes`` of a struct. Labels are integers, or strings whose sorted names become classes. If the files have
    no label column, folders such as ``label=cat`` replace it. Like Spark and pyarrow, the source skips files and
    folders whose names begin with ``.`` or ``_``. It also skips files without rows.
    """

    class Options(registry.MethodConfig):
        """Location of the files, and the columns to read."""

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
        self._labels = ParquetLabels(self._files, options.label_column, options.classes)

    def files(self, split: Split) -> list[str]:
        """Return the sorted paths of a split within the source's filesystem; raises DataError if there are none."""
        return self._files.files(split)

    def unused(self) -> tuple[str, ...]:
        return self._files.unused()

    @cached_property
    def _image_column(self) -> str:
        names = list(self._files.first[1].names)
        return find_column(self._files, names, "image_column", self.options.image_column, IMAGE_COLUMNS)

    def columns(self) -> tuple[str, str]:
        """Return the names of the image and the label column; raises DataError if there is none."""
        return self._image_column, self._labels.column

    @property
    def classes(self) -> tuple[str, ...]:
        self.columns()  # raises for a missing image column too
        return self._labels.classes

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
            labels = self._labels.labels(path)
            first = 0
            with self._files.open(path) as file:
                if not len(labels):  # such a file may have no columns either
                    continue
                check_column(file.schema_arrow, column, path)
                sizes = [file.metadata.row_group(index).num_rows for index in range(file.num_row_groups)]
            for index, num in enumerate(sizes):
                if num:
                    yield RowGroup(path, index, first, labels[first : first + num])
                first += num

    def read(self, group: RowGroup, column: str) -> Iterator[tuple[str, int, bytes | None]]:
        """Yield (name, label, encoded image) of each row of a group, with few rows in memory at a time."""
        row = 0
        with self._files.open(group.path) as file, pyarrow_errors(group.path):
            # pyarrow cannot slice arrays of views.
            has_views = "view" in str(file.schema_arrow.field(column).type)
            num = max(1, len(group.labels)) if has_views else ROWS_AT_A_TIME
            for batch in file.iter_batches(num, row_groups=[group.number], columns=[column]):
                for data in _binary_array(batch.column(0), group.path, column):
                    yield f"{group.path} row {group.first + row}", int(group.labels[row]), data.as_py()
                    row += 1

    def _read(self, split: Split) -> Iterator[Example]:
        column = self.columns()[0]
        items = (item for group in self.groups(split) for item in self.read(group, column))
        return decode_all(items, size=self.size, channels=self.channels)


def _binary_array(array: Any, path: str, column: str) -> Any:
    """Return the encoded images of a part of the image column, which is binary or a struct with ``bytes``."""
    if pa.types.is_struct(array.type) and array.type.get_field_index("bytes") >= 0:
        array = pc.struct_field(array, "bytes")
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    kind = array.type
    if not (
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_binary_view(kind)
        or pa.types.is_fixed_size_binary(kind)
    ):
        raise DataError(f"{path}: image column {column!r} is {kind}, allowed is binary or a struct with bytes")
    return array
