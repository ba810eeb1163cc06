"""Accuracy on protected images and how much they still look like the plain ones."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raypp.bundle.load import load_private, load_public
from raypp.bundle.manifest import MANIFEST
from raypp.config.overrides import deep_merge, flatten_dict, parse_overrides
from raypp.config.validation import validate
from raypp.data.loader import inference_batch_size, to_device, to_float_tensor
from raypp.data.splits import load_split
from raypp.metrics.image import psnr, ssim
from raypp.metrics.statistics import wilson_interval
from raypp.protections.base import Protection
from raypp.utils.errors import BundleError, ConfigError, DataError
from raypp.utils.images import jpeg_roundtrip, to_uint8
from raypp.utils.storage import Storage

Numbers = dict[str, Any]


@torch.inference_mode()
def evaluate(
    protection: Protection,
    classifier: nn.Module,
    images: Tensor,
    labels: Tensor,
    batch_size: int = 500,
    jpeg: int | None = None,
) -> Numbers:
    """Measure a protection and its classifier on plain images.

    Args:
        images: uint8 (N, H, W, C) on the device of the networks.
        labels: int64 (N,).
        batch_size: images at a time; of large images fewer, see :func:`raypp.data.loader.inference_batch_size`.
        jpeg: also measure what is classified after a JPEG of this quality: ``accuracy_jpeg`` with its interval.

    Returns:
        ``accuracy`` is measured after 8-bit rounding, as everything is that a client uploads, with its 95% Wilson
        interval; ``accuracy_float`` is the extra without rounding. ``ssim`` and ``psnr`` compare protected with plain
        images: mean, median, and the 99th percentile (the least protected); SSIM is None below 11 pixels a side.
        ``saturated`` is the share of protected values that are 0 or 255. ``chance`` is the accuracy of always naming
        the most frequent class of these images.
    """
    protection.eval()
    classifier.eval()
    correct = correct_float = correct_jpeg = saturated = num_values = 0
    similarities: list[Tensor] = []
    distances: list[Tensor] = []
    batch_size = inference_batch_size(images, batch_size)
    for start in range(0, len(images), batch_size):
        plain, target = to_float_tensor(images[start : start + batch_size]), labels[start : start + batch_size]
        as_float = protection(plain)
        upload = to_uint8(as_float)
        protected = upload.float() / 255
        correct += int((classifier(protected).argmax(1) == target).sum())
        correct_float += int((classifier(as_float).argmax(1) == target).sum())
        if jpeg is not None:
            pixels = jpeg_roundtrip(upload.permute(0, 2, 3, 1).cpu().numpy(), jpeg)
            arrived = to_float_tensor(torch.from_numpy(pixels).to(upload.device))
            correct_jpeg += int((classifier(arrived).argmax(1) == target).sum())
        saturated += int(((upload == 0) | (upload == 255)).sum())
        aligned = protection.aligned(plain)
        if min(plain.shape[-2:]) >= 11:
            similarities.append(ssim(aligned, protected))
        distances.append(psnr(aligned, protected))
        num_values += upload.numel()
    num = len(images)
    re_encoded: Numbers = {}
    if jpeg is not None:
        interval = wilson_interval(correct_jpeg, num)
        re_encoded = {"jpeg": jpeg, "accuracy_jpeg": correct_jpeg / num, "accuracy_jpeg_interval": interval}
    return re_encoded | {
        "num_images": num,
        "accuracy": correct / num,
        "accuracy_interval": wilson_interval(correct, num),
        "accuracy_float": correct_float / num,
        "chance": int(labels.bincount().max()) / num,
        "ssim": _summary(torch.cat(similarities)) if similarities else None,
        "psnr": _summary(torch.cat(distances)),
        "saturated": saturated / num_values,
    }


def _summary(values: Tensor) -> dict[str, float | None]:
    """Mean, median and 99th percentile; None where they are infinite (identical images)."""
    values = values.float().cpu()
    numbers = (values.mean(), values.median(), torch.quantile(values, 0.99))
    return {
        name: round(float(n), 4) if math.isfinite(n) else None
        for name, n in zip(("mean", "median", "p99"), numbers, strict=True)
    }


def evaluate_bundle(
    location: str | Path, settings: tuple[str, ...] = (), split: str = "test", jpeg: int | None = None
) -> Numbers:
    """Measure a bundle from its files alone, on the data that it was trained with or that ``settings`` name.

    Args:
        location: path or URI of a bundle.
        settings: flags laid over the bundle's own configuration, such as ``("--data.source.path", "images")``.
        split: ``test`` or ``train``.
        jpeg: as :func:`evaluate` takes it.

    Raises:
        BundleError: the bundle is missing, altered or incomplete.
        DataError: the images cannot be read, or have other classes than the bundle.
    """
    storage = Storage(location)
    if storage.exists() and not all(storage.exists(f"{part}/{MANIFEST}") for part in ("public", "private")):
        raise BundleError(f"{str(location)!r} is no whole bundle; measuring needs its public and its private part")
    public, private = load_public(location), load_private(location)
    given = parse_overrides(settings)
    for name in flatten_dict(given):
        if not name.startswith("data.") and name != "train.eval_batch_size":
            raise ConfigError(f"--{name} changes nothing here; allowed are data.* and train.eval_batch_size")
    config = validate(deep_merge(private.config, given))
    config = config.model_copy(update={"data": config.data.model_copy(update={"stream": False})})
    images = load_split(config, split)
    if images.classes != private.classes:
        raise DataError(
            f"data.source has the classes {', '.join(images.classes)}; the bundle reads {', '.join(private.classes)}"
        )
    size = (images.images.shape[1], images.images.shape[2])
    if config.data.channels != public.channels:
        raise DataError(f"data.channels is {config.data.channels}; the bundle reads {public.channels}")
    if validate(private.config).adaptation_name != "none" and size != public.image_size:
        raise DataError(
            f"the images are {size[0]} x {size[1]}; the bundle's classifier reads {public.image_size[0]} x "
            f"{public.image_size[1]} only; see data.image_size"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return evaluate(
        public.protection.to(device),
        private.classifier.to(device),
        *to_device(images.images, images.labels, device),
        config.train.eval_batch_size,
        jpeg,
    )
