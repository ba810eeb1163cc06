"""Accuracy on protected images, and their similarity to the plain images."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raypp.bundle.load import PrivateBundle, PublicBundle, load_private, load_public
from raypp.bundle.manifest import MANIFEST
from raypp.config.overrides import Settings, deep_merge, flatten_dict, parse_overrides
from raypp.config.validation import validate
from raypp.data.base import ImageDataset, stratified_split
from raypp.data.loader import inference_batch_size, to_device, to_float_tensor
from raypp.data.splits import load_split
from raypp.metrics.image import MIN_SIDE, psnr, ssim, use_backend
from raypp.metrics.statistics import wilson_interval
from raypp.protections.base import Protection
from raypp.utils.device import default_device
from raypp.utils.errors import BundleError, ConfigError, DataError
from raypp.utils.images import jpeg_roundtrip, to_uint8
from raypp.utils.storage import Storage

Metrics = dict[str, Any]
SPLITS = ("test", "val", "train")


@torch.inference_mode()
def evaluate(
    protection: Protection,
    classifier: nn.Module,
    images: Tensor,
    labels: Tensor,
    batch_size: int = 500,
    jpeg: int | None = None,
) -> Metrics:
    """Measure a protection and its classifier on plain images.

    Args:
        images: uint8 (N, H, W, C) on the device of the networks.
        labels: int64 (N,).
        batch_size: images per batch; fewer for large images, see :func:`raypp.data.loader.inference_batch_size`.
        jpeg: also measure ``accuracy_jpeg`` and its interval after JPEG compression with this quality.

    Returns:
        ``accuracy`` after the 8-bit rounding of uploads, with its 95% Wilson interval; ``accuracy_float`` without
        rounding. ``ssim`` and ``psnr`` of protected to plain images: mean, median and 99th percentile (the least
        protected); SSIM is None below 11 pixels a side. ``saturated`` is the share of protected values that are 0 or
        255. ``chance`` is the accuracy of always predicting the most frequent class.
    """
    protection.eval()
    classifier.eval()
    batch_size = inference_batch_size(images, batch_size)
    batches = [
        _evaluate_batch(protection, classifier, to_float_tensor(plain), target, jpeg)
        for plain, target in zip(images.split(batch_size), labels.split(batch_size), strict=True)
    ]
    values = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    num = len(images)
    metrics: Metrics = {}
    if jpeg is not None:
        correct = int(values["correct_jpeg"].sum())
        interval = wilson_interval(correct, num)
        metrics = {"jpeg": jpeg, "accuracy_jpeg": correct / num, "accuracy_jpeg_interval": interval}
    correct = int(values["correct"].sum())
    return metrics | {
        "num_images": num,
        "accuracy": correct / num,
        "accuracy_interval": wilson_interval(correct, num),
        "accuracy_float": int(values["correct_float"].sum()) / num,
        "chance": int(labels.bincount().max()) / num,
        "ssim": _summary(values["ssim"]) if "ssim" in values else None,
        "psnr": _summary(values["psnr"]),
        "saturated": int(values["num_saturated"].sum()) / int(values["num_values"].sum()),
    }


def _evaluate_batch(
    protection: Protection, classifier: nn.Module, plain: Tensor, labels: Tensor, jpeg: int | None
) -> dict[str, Tensor]:
    """Per-image results (N,) of plain images float (N, C, H, W)."""
    protected_float = protection(plain)
    upload = to_uint8(protected_float)
    protected = upload.float() / 255
    original = protection.aligned(plain)
    results = {
        "correct": classifier(protected).argmax(1) == labels,
        "correct_float": classifier(protected_float).argmax(1) == labels,
        "psnr": psnr(original, protected),
        "num_saturated": ((upload == 0) | (upload == 255)).flatten(1).sum(1),
        "num_values": torch.full((len(upload),), upload[0].numel()),
    }
    if min(plain.shape[-2:]) >= MIN_SIDE:
        results["ssim"] = ssim(original, protected)
    if jpeg is not None:
        pixels = jpeg_roundtrip(upload.permute(0, 2, 3, 1).cpu().numpy(), jpeg)
        decoded = to_float_tensor(torch.from_numpy(pixels).to(upload.device))
        results["correct_jpeg"] = classifier(decoded).argmax(1) == labels
    return results


def _summary(values: Tensor) -> dict[str, float | None]:
    """Mean, median and 99th percentile; None where they are infinite (identical images)."""
    values = values.float().cpu()
    numbers = {"mean": values.mean(), "median": values.median(), "p99": torch.quantile(values, 0.99)}
    return {name: round(float(n), 4) if math.isfinite(n) else None for name, n in numbers.items()}


def evaluate_bundle(
    location: str | Path, settings: Settings = (), split: str = "test", jpeg: int | None = None
) -> Metrics:
    """Measure a bundle from its files, on its own data or on the data that ``settings`` select.

    Args:
        location: path or URI of a bundle.
        settings: flags that override the bundle's configuration, such as ``("data.source.path=images",)``.
        split: ``test``, ``val`` (the validation images of the training) or ``train``.
        jpeg: as in :func:`evaluate`.

    Raises:
        BundleError: the bundle is missing, altered or incomplete.
        DataError: the images cannot be read, or do not match the bundle.
    """
    if split not in SPLITS:
        raise ConfigError(f"split is {split!r}; allowed: {', '.join(SPLITS)}")
    if jpeg is not None and (not isinstance(jpeg, int) or not 1 <= jpeg <= 100):
        raise ConfigError(f"jpeg is {jpeg!r}; allowed is a quality from 1 to 100")
    storage = Storage(location)
    if storage.exists() and not all(storage.exists(f"{part}/{MANIFEST}") for part in ("public", "private")):
        raise BundleError(f"{str(location)!r} is no whole bundle; measuring needs its public and its private part")
    public, private = load_public(location), load_private(location)
    overrides = parse_overrides(settings)
    for name in flatten_dict(overrides):
        if not name.startswith(("data.", "metrics.")) and name != "train.eval_batch_size":
            raise ConfigError(f"--{name} changes nothing here; allowed: data.*, metrics.* and train.eval_batch_size")
    config = validate(deep_merge(private.config, overrides))
    config = config.model_copy(update={"data": config.data.model_copy(update={"stream": False})})
    images = load_split(config, "train" if split == "val" else split)
    if split == "val":
        images = images.subset(stratified_split(images.labels, config.data.num_val, config.seed)[1])
    _check_images(images, config.data.channels, public, private)
    device = default_device()
    with use_backend(config.metrics.backend):
        return evaluate(
            public.protection.to(device),
            private.classifier.to(device),
            *to_device(images.images, images.labels, device),
            config.train.eval_batch_size,
            jpeg,
        )


def _check_images(images: ImageDataset, channels: int, public: PublicBundle, private: PrivateBundle) -> None:
    """Raise DataError unless the images have the bundle's classes, channels and size."""
    if images.classes != private.classes:
        raise DataError(
            f"data.source has the classes {', '.join(images.classes)}; the bundle reads {', '.join(private.classes)}"
        )
    if channels != public.channels:
        raise DataError(f"data.channels is {channels}; the bundle reads {public.channels}")
    size = images.images.shape[1:3]
    if validate(private.config).adaptation_name != "none" and size != public.image_size:
        raise DataError(
            f"the images are {size[0]} x {size[1]}; the bundle's classifier reads {public.image_size[0]} x "
            f"{public.image_size[1]} only; see data.image_size"
        )
