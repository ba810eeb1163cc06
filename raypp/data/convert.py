"""List the data sources, convert one to Parquet, and check one for damage and duplicates."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raypp.data import SOURCES
from raypp.data.base import MIN_BYTES_FOR_THREADS, NUM_THREADS, DataSource, Fingerprint, Split, check_labels
from raypp.utils.errors import DataError, StorageError
from raypp.utils.images import encode_png
from raypp.utils.storage import new_folder

ROWS_PER_GROUP = 1000
NUM_LISTED = 20
SPLITS: tuple[Split, ...] = get_args(Split)
Progress = Callable[[Split, int, int], None]
"""Receives a split, the number of its images that are written, and their total."""


def describe() -> list[dict[str, Any]]:
    """Return the name, the documentation's first line and the options of each source.

    Options map each field to its default as text, or to "required".
    """
    entries = []
    for name in SOURCES:
        fields = {key: field for key, field in SOURCES.options(name).model_fields.items() if key != "name"}
        options = {key: "required" if field.is_required() else str(field.default) for key, field in fields.items()}
        entries.append({"name": name, "doc": (SOURCES.get(name).__doc__ or "").splitlines()[0], "options": options})
    return entries


def convert(source: DataSource, out: Path, *, rows_per_file: int = 50_000, progress: Progress | None = None) -> None:
    """Write a source as Parquet files in the Hugging Face layout, images as PNG, into a new or empty folder.

    The conversion runs in bounded memory and leaves no folder after an error. A split of more than ``rows_per_file``
    images becomes several files.

    Raises:
        DataError: an image cannot be used.
        StorageError: ``out`` is not empty or cannot be written.
    """
    if not out.name or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        raise StorageError(f"{out} exists and is not an empty folder")
    with new_folder(out) as folder:
        for split in SPLITS:
            _write_split(source, split, folder, rows_per_file, progress)


def _write_split(source: DataSource, split: Split, folder: Path, rows_per_file: int, progress: Progress | None) -> None:
    num, num_written = source.num_images(split), 0
    num_files = -(-num // rows_per_file)
    features = {"img": {"_type": "Image"}, "label": {"names": list(source.classes), "_type": "ClassLabel"}}
    schema = pa.schema(
        [("img", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    examples = source.examples(split)
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        for index in range(num_files):
            path = folder / f"{split}-{index:05d}-of-{num_files:05d}.parquet"
            examples_of_file = islice(examples, rows_per_file)
            with pq.ParquetWriter(path, schema, compression="none") as writer:  # PNG is compressed already
                while group := list(islice(examples_of_file, ROWS_PER_GROUP)):
                    images = [example.pixels() for example in group]
                    encode = pool.map if images[0].nbytes >= MIN_BYTES_FOR_THREADS else map
                    rows = [
                        {"bytes": png, "path": f"{split}/{row:08d}.png"}
                        for row, png in enumerate(encode(encode_png, images), num_written)
                    ]
                    writer.write_table(pa.table([rows, [example.label for example in group]], schema=schema))
                    num_written += len(group)
                    if progress:
                        progress(split, num_written, num)


@dataclass(frozen=True)
class SplitReport:
    """Contents of one split.

    Attributes:
        num_images, counts: readable images, in all and of every class.
        shape: (H, W, C), or None if no image is readable.
        num_duplicates: number of images whose pixels occur before in the same split.
        unreadable: error messages of the first NUM_LISTED unreadable images.
        fingerprint: that of the loaded :class:`ImageDataset`, or None if an image is unreadable.
        problem: error message if the whole split cannot be used.
    """

    num_images: int
    shape: tuple[int, ...] | None
    counts: dict[str, int]
    num_duplicates: int
    unreadable: tuple[str, ...]
    num_unreadable: int
    fingerprint: str | None
    problem: str | None = None


@dataclass(frozen=True)
class Report:
    """Both splits, the number of test images with the pixels of a train image, and paths that belong to no split."""

    train: SplitReport
    test: SplitReport
    num_shared: int
    unused: tuple[str, ...] = ()

    @property
    def readable(self) -> bool:
        """Whether both splits and all their images can be used."""
        return not any(split.num_unreadable or split.problem for split in (self.train, self.test))


def check(source: DataSource) -> Report:
    """Read every image once, in bounded memory; raises DataError if the source, or its labels, cannot be read."""
    train, train_counts = _check_split(source, "train")
    test, test_counts = _check_split(source, "test")
    num_shared = sum(num for key, num in test_counts.items() if key in train_counts)
    return Report(train, test, num_shared, source.unused())


def _check_split(source: DataSource, split: Split) -> tuple[SplitReport, Counter[bytes]]:
    """Return the report, and the number of images by the hash of their pixels."""
    fingerprint, hash_counts = Fingerprint(), Counter[bytes]()
    labels: list[int] = []
    unreadable: list[str] = []
    num_unreadable = 0
    shape: tuple[int, ...] | None = None
    for example in source.examples(split):
        if isinstance(example.image, DataError):
            num_unreadable += 1
            if num_unreadable <= NUM_LISTED:
                unreadable.append(str(example.image))
            continue
        shape = example.image.shape
        hash_counts[hashlib.blake2b(example.image.tobytes(), digest_size=16).digest()] += 1
        labels.append(example.label)
        fingerprint.add(example.image)
    classes = source.classes
    problem = None
    if labels or not num_unreadable:  # otherwise the messages of the images suffice
        try:
            check_labels(labels, split, classes)
        except DataError as error:
            problem = str(error)
    counts = np.bincount(np.asarray(labels, dtype=np.int64), minlength=len(classes))
    report = SplitReport(
        num_images=len(labels),
        shape=shape,
        counts=dict(zip(classes, counts.tolist(), strict=True)),
        num_duplicates=len(labels) - len(hash_counts),
        unreadable=tuple(unreadable),
        num_unreadable=num_unreadable,
        fingerprint=None if num_unreadable or shape is None else fingerprint.hexdigest(shape, labels, classes),
        problem=problem,
    )
    return report, hash_counts
