"""Stream training images that do not fit in memory through Ray Data.

Ray tasks read, split, decode and shuffle encoded images while workers train. Memory holds blocks up to a limit for each
worker and the shuffle buffers, whatever the size of the set. Validation images are those whose keyed hash is below a
threshold. This split needs no index, does not depend on order or number of workers, and keeps identical images
together.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterator
from functools import singledispatch
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import ray.data
import ray.train
import torch
from torch import Tensor

from raypp.data import SOURCES
from raypp.data.base import DataSource, check_labels, read_encoded
from raypp.data.folder import Folder
from raypp.data.loader import Augmentation, make_generator, to_device, to_float_tensor
from raypp.data.parquet import ROWS_AT_A_TIME, Parquet, RowGroup
from raypp.data.validation_set import Batch, load_validation_set, save_validation_set
from raypp.utils.errors import ConfigError, DataError, reported_error
from raypp.utils.images import decode, printable
from raypp.utils.storage import Storage

if TYPE_CHECKING:
    from raypp.config.schema import Config

BLOCK_BYTES = 16 * 2**20
PREFETCHED_BATCHES = 2  # decoded, shuffled and copied to the device while the network trains on one


class Stream(NamedTuple):
    """The training split of a source as two lazy sets, with rows of ``image`` uint8 (H, W, C) and ``label``."""

    train: ray.data.Dataset
    val: ray.data.Dataset
    fingerprint: str | None
    """Identifies data and settings that select the validation images; None if the source cannot tell."""


@singledispatch
def read_encoded_rows(source: DataSource, seed: int) -> ray.data.Dataset:  # noqa: ARG001 (implementations use it)
    """Return the training split as rows of ``name``, ``label`` and, if the source reads them, ``bytes``."""
    raise ConfigError(
        f"data.stream cannot read data.source {source.options.name!r}; allowed: parquet, folder "
        "(raypp data convert turns any source into Parquet)"
    )


@read_encoded_rows.register
def _(source: Parquet, seed: int) -> ray.data.Dataset:
    groups = list(source.groups("train"))  # raises for invalid labels before anything starts
    labels = np.concatenate([np.empty(0, np.int64), *(group.labels for group in groups)])
    check_labels(labels, "train", source.classes)
    order = np.random.default_rng(seed).permutation(len(groups))
    items = [group._replace(labels=group.labels.tobytes())._asdict() for group in (groups[i] for i in order)]

    def read_rows(batch: Batch) -> Iterator[Batch]:
        for path, number, first, label_bytes in zip(*(batch[key] for key in RowGroup._fields), strict=True):
            group = RowGroup(str(path), int(number), int(first), np.frombuffer(label_bytes, np.int64))
            rows = source.read(group)
            while block := list(itertools.islice(rows, ROWS_AT_A_TIME)):
                names, labels, images = zip(*block, strict=True)
                cells = np.empty(len(images), dtype=object)
                cells[:] = [image or b"" for image in images]
                yield {"name": np.array(list(map(os.fsencode, names))), "label": np.array(labels), "bytes": cells}

    return ray.data.from_items(items).map_batches(read_rows, batch_format="numpy", batch_size=1)


@read_encoded_rows.register
def _(source: Folder, seed: int) -> ray.data.Dataset:
    files = source.files("train")
    check_labels([label for _, label in files], "train", source.classes)
    order = np.random.default_rng(seed).permutation(len(files))
    return ray.data.from_items([{"name": os.fsencode(files[i][0]), "label": files[i][1]} for i in order])


def open_stream(config: Config) -> Stream:
    """Open the training split; raises ConfigError or DataError for a set that cannot be streamed."""
    if config.data.image_size is None:
        raise ConfigError("data.stream needs data.image_size, as in --data.image_size '[32, 32]'")
    if config.data.num_train is not None:
        raise ConfigError("data.num_train does not apply to data.stream; convert a part of the set instead")
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = BLOCK_BYTES
    source = _build_source(config)
    num = source.num_images("train")
    if config.data.num_val >= num:
        raise DataError(f"data.num_val is {config.data.num_val}, allowed is less than the {num} training images")
    rows = read_encoded_rows(source, config.seed)
    options = {
        "val_fraction": config.data.num_val / num,
        "key": config.seed,
        "size": config.data.image_size,
        "channels": config.data.channels,
    }

    def decode_split(is_val: bool) -> ray.data.Dataset:
        return rows.map_batches(_decode, batch_format="numpy", batch_size=256, fn_kwargs={"is_val": is_val, **options})

    return Stream(decode_split(is_val=False), decode_split(is_val=True), _fingerprint(config, source))


def _fingerprint(config: Config, source: DataSource) -> str | None:
    data, versions = config.data, source.versions("train")
    if versions is None:
        return None
    settings = (data.source.model_dump(mode="json"), data.image_size, data.channels, data.num_val, config.seed)
    return hashlib.sha256(repr((settings, source.classes, versions)).encode()).hexdigest()


def _build_source(config: Config) -> DataSource:
    data = config.data
    source: DataSource = SOURCES.build(data.source, size=data.image_size, channels=data.channels)
    return source


def validation_set(
    stream: Stream, run: Storage, options: ray.data.ExecutionOptions, on_read: Callable[[], None]
) -> Batch:
    """Return the validation images and labels that the run has stored, or select them by a pass over the whole set.

    Args:
        run: the run's folder, which stores them.
        options: of :func:`build_execution_options`.
        on_read: called before the pass.

    Raises:
        DataError: there is no validation image, or an image is damaged.
    """
    stored = load_validation_set(run, stream.fingerprint) if stream.fingerprint is not None else None
    if stored is not None:
        return stored
    on_read()
    images = _collect(stream.val, options)
    if stream.fingerprint is not None:
        save_validation_set(run, images, stream.fingerprint)
    return images


def _collect(rows: ray.data.Dataset, options: ray.data.ExecutionOptions) -> Batch:
    rows.context.execution_options = options
    try:
        batches = [batch for batch in rows.iter_batches(batch_format="numpy", batch_size=1024) if len(batch["label"])]
    except ray.exceptions.RayError as error:
        raise DataError(str(reported_error(str(error)) or f"the images cannot be read: {error}")) from error
    if not batches:
        raise DataError("data.num_val left no validation image in this set; raise it")
    return {key: np.concatenate([batch[key] for batch in batches]) for key in ("image", "label")}


def build_execution_options(config: Config, num_workers: int) -> ray.data.ExecutionOptions:
    """Return options that bound the memory of blocks in flight and keep them in the order of the files."""
    num_bytes = num_workers * config.data.stream_mib_per_worker * 2**20
    limits = ray.data.ExecutionResources.for_limits(object_store_memory=num_bytes)
    # The order lets a resumed epoch skip the images that were trained on.
    return ray.data.ExecutionOptions(resource_limits=limits, preserve_order=True)


def _decode(
    batch: Batch, *, is_val: bool, val_fraction: float, key: int, size: tuple[int, int], channels: int
) -> Batch:
    images, labels = [], []
    for i, (encoded_name, label) in enumerate(zip(batch["name"], batch["label"], strict=True)):
        path = os.fsdecode(encoded_name)
        name = printable(path)
        data = read_encoded(batch["bytes"][i] if "bytes" in batch else Path(path), name)
        if not data:
            raise DataError(f"{name} holds no image bytes")
        if (_hash_to_unit_interval(data, key) < val_fraction) != is_val:
            continue
        images.append(decode(data, name=name, size=size, channels=channels))
        labels.append(int(label))
    return {
        "image": np.stack(images) if images else np.empty((0, *size, channels), dtype=np.uint8),
        "label": np.asarray(labels, dtype=np.int64),
    }


def _hash_to_unit_interval(data: bytes, key: int) -> float:
    """Return a number in [0, 1) that depends only on the bytes and the key."""
    digest = hashlib.blake2b(data, digest_size=8, key=key.to_bytes(8, "big")).digest()
    return int.from_bytes(digest, "big") / 2**64


class StreamLoader:
    """Batches of this worker's shard of the training stream; a :class:`raypp.data.loader.BatchLoader`.

    The device holds the validation images as uint8.
    """

    def __init__(
        self,
        config: Config,
        val: Batch,
        device: torch.device,
        rank: int,
        world: int,
        first: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        source = _build_source(config)
        self._config, self._device, self._rank, self._first = config, device, rank, first
        self._batch_size = config.train.batch_size // world
        self._augmentation = Augmentation(config.data.augment.crop_padding, config.data.augment.flip)
        self.classes = source.classes
        labels = val["label"].copy()  # Ray's arrays are read-only views
        self.val: tuple[Tensor, Tensor] = to_device(val["image"].copy(), labels, device)
        num = source.num_images("train")
        self.num_train = num - len(labels)
        self.num_batches = max(1, self.num_train // world // self._batch_size)
        self.fingerprint = hashlib.sha256(
            repr((num, source.classes, hashlib.sha256(np.sort(labels).tobytes()).hexdigest())).encode()
        ).hexdigest()

    def epoch(self, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        # A stream cannot seek: a resumed epoch reads the first batches again and skips them. Every epoch reads in the
        # same order, and its seed shuffles the buffer.
        seed = self._config.seed
        batches = ray.train.get_dataset_shard("train").iter_torch_batches(
            batch_size=self._batch_size,
            drop_last=True,
            local_shuffle_buffer_size=max(self._config.data.shuffle_buffer, self._batch_size),
            local_shuffle_seed=seed + epoch,
            prefetch_batches=PREFETCHED_BATCHES,
            device=self._device,
            pin_memory=self._device.type == "cuda",  # only from such memory do copies run while the GPU computes
        )
        for step, batch in enumerate(itertools.islice(batches, first, None), first):
            images, labels = batch["image"], batch["label"]
            if self._first is not None:
                images = self._first(images)
            params = self._augmentation.sample_params(len(labels), make_generator(seed, epoch, step, self._rank))
            yield to_float_tensor(self._augmentation.apply(images, *params)), labels
