"""The splits of a configured data source."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raypp.data import SOURCES
from raypp.data.base import ImageDataset, stratified_split
from raypp.utils.errors import DataError

if TYPE_CHECKING:
    from raypp.config.schema import Config

_split_cache: dict[str, ImageDataset] | None = None


def enable_split_cache() -> None:
    """Keep every split in memory after its first read, for a process that trains many runs on the same images."""
    global _split_cache
    _split_cache = {} if _split_cache is None else _split_cache


def load_split(config: Config, split: str) -> ImageDataset:
    """Read one split of the configured source, resized to ``data.image_size``."""
    data = config.data
    key = f"{data.source.model_dump_json()} {data.image_size} {data.channels} {split}"
    images = _split_cache.get(key) if _split_cache is not None else None
    if images is None:
        images = SOURCES.build(data.source, size=data.image_size, channels=data.channels).load(split)
        if _split_cache is not None:
            _split_cache[key] = images
    return subsample(images, data.num_test, config.seed, "data.num_test") if split == "test" else images


def subsample(images: ImageDataset, num: int | None, seed: int, field: str) -> ImageDataset:
    """Return a stratified subset of ``num`` images, or all for None."""
    if num is None or num == len(images):
        return images
    if num > len(images):
        raise DataError(f"{field} is {num}, but there are only {len(images)} images")
    return images.subset(stratified_split(images.labels, num, seed)[1])
