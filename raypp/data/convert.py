"""What ``raypp data`` does: list the sources, convert one to Parquet, check one for damage and duplicates."""

from __future__ import annotations

import hashlib
import json
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
from raypp.data.base import THREADS_FROM, DataSource, Example, Fingerprint, Split, check_labels, num_threads
from raypp.utils.errors import DataError, StorageError
from raypp.utils.images import Pixels, encode_png
from raypp.utils.storage import new_folder

ROWS_PER_GROUP = 1000
NUM_LISTED = 20
SPLITS: tuple[Split, ...] = get_args(Split)


def describe() -> list[dict[str, Any]]:
    """Return one entry per source: its name, the first line of its documentation, and its options.

    Options map each field to its default as text, or to "required".
    """
    entries = []
    for name in SOURCES:
        fields = SOURCES.options(name).model_fields
        options = {
            key: "required" if field.is_required() else str(field.default)
            for key, field in fields.items()
            if key != "name"
        }
        entries.append({"name": name, "doc": (SOURCES.get(name).__doc__ or "").splitlines()[0], "options": options})
    return entries


def convert(
    source: DataSource,
    out: Path,
    *,
    rows_per_file: int = 50_000,
    progress: Callable[[Split, int, int], None] | None = None,
) -> None:
    """Write a source as Parquet files in the Hugging Face layout, images as PNG.

    The folder appears whole or not at all.

    Args:
        source: what to convert; it is read in bounded memory.
        out: folder to create; it may exist if it is empty.
        rows_per_file: a larger split becomes several files.
        progress: called with the split, the images written and their total.

    Raises:
        DataError: an image cannot be used.
        StorageError: ``out`` is taken or cannot be written.
    """
    if not out.name or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        raise StorageError(f"{out} exists and is not an empty folder")
    with new_folder(out) as aside:
        for split in SPLITS:
            _write_split(source, split, aside, rows_per_file, progress)


def _write_split(
    source: DataSource,
    split: Split,
    folder: Path,
    rows_per_file: int,
    progress: Callable[[Split, int, int], None] | None,
) -> None:
    num, done = source.num_images(split), 0
    num_files = -(-num // rows_per_file)
    features = {"img": {"_type": "Image"}, "label": {"names": list(source.classes), "_type": "ClassLabel"}}
    schema = pa.schema(
        [("img", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    records = source.records(split)
    with ThreadPoolExecutor(num_threads()) as pool:
        for index in range(num_files):
            path = folder / f"{split}-{index:05d}-of-{num_files:05d}.parquet"
            in_file = islice(records, rows_per_file)
            with pq.ParquetWriter(path, schema, compression="none") as writer:  # PNG is compressed already
                while group := list(islice(in_file, ROWS_PER_GROUP)):
                    images = [_usable(record) for record in group]
                    encode = pool.map if images[0].nbytes >= THREADS_FROM else map
                    rows = [
                        {"bytes": png, "path": f"{split}/{row:08d}.png"}
                        for row, png in enumerate(encode(encode_png, images), done)
                    ]
                    writer.write_table(pa.table([rows, [record.label for record in group]], schema=schema))
                    done += len(group)
                    if progress:
                        progress(split, done, num)


def _usable(record: Example) -> Pixels:
    if isinstance(record.image, DataError):
        raise record.image
    return record.image


@dataclass(frozen=True)
class SplitReport:
    """What one split holds.

    Attributes:
        num_images: readable images.
        shape: (H, W, C), or None if no image is readable.
        counts: readable images per class, every class named.
        num_duplicates: images whose pixels occurred before in the same split.
        unreadable: why images cannot be used, a sentence each, the first 20.
        num_unreadable: how many there are.
        fingerprint: that of the loaded :class:`ImageSet`, or None if any image is unreadable.
        problem: why the split as a whole cannot be used, a sentence.
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
    """Both splits, how many test images have the pixels of a train image, and what belongs to no split."""

    train: SplitReport
    test: SplitReport
    num_shared: int
    unused: tuple[str, ...] = ()

    @property
    def readable(self) -> bool:
        """Whether every image of both splits, and each split as a whole, can be used."""
        return not any(part.num_unreadable or part.problem for part in (self.train, self.test))


def check(source: DataSource) -> Report:
    """Read every image of a source once, in bounded memory, and report instead of stopping at the first bad one.

    Raises:
        DataError: the source as a whole, or its labels, cannot be read.
    """
    train, in_train = _check_split(source, "train")
    test, in_test = _check_split(source, "test")
    num_shared = sum(num for key, num in in_test.items() if key in in_train)
    return Report(train, test, num_shared, source.unused())


def _check_split(source: DataSource, split: Split) -> tuple[SplitReport, dict[bytes, int]]:
    """Return the report, and how often each image occurs by the hash of its pixels."""
    fingerprint = Fingerprint()
    labels: list[int] = []
    seen: dict[bytes, int] = {}
    unreadable: list[str] = []
    num_unreadable = 0
    shape: tuple[int, ...] | None = None
    for record in source.records(split):
        if isinstance(record.image, DataError):
            num_unreadable += 1
            if num_unreadable <= NUM_LISTED:
                unreadable.append(str(record.image))
            continue
        shape = record.image.shape
        key = hashlib.blake2b(record.image.tobytes(), digest_size=16).digest()
        seen[key] = seen.get(key, 0) + 1
        labels.append(record.label)
        fingerprint.add(record.image)
    classes = source.classes
    problem = None
    if labels or not num_unreadable:  # else each image has its sentence
        try:
            check_labels(labels, split, classes)
        except DataError as error:
            problem = str(error)
    counts = np.bincount(np.asarray(labels, dtype=np.int64), minlength=len(classes))
    report = SplitReport(
        num_images=len(labels),
        shape=shape,
        counts=dict(zip(classes, counts.tolist(), strict=True)),
        num_duplicates=len(labels) - len(seen),
        unreadable=tuple(unreadable),
        num_unreadable=num_unreadable,
        fingerprint=None if num_unreadable or shape is None else fingerprint.hexdigest(shape, labels, classes),
        problem=problem,
    )
    return report, seen
