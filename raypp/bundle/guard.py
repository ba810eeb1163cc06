"""Detector of plain images: a service uses it to refuse images that a client forgot to protect.

A logistic regression on simple image statistics, fitted to one protection. It does not stop an attacker who wants to
send a plain image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raypp.metrics.statistics import wilson_interval
from raypp.models.tracing import trace_forward

BINS = 16
LEAST = 100  # images of each kind, both for the fit and for the threshold
MAX_FALSE_REJECTIONS = 0.001  # share of the protected images that the threshold is set with
RIDGE = 1e-3
MAX_ZSCORE = 10.0
PART_VALUES = 2**22  # pixel values per batch of images; their statistics need about 30 bytes per value


@dataclass(frozen=True)
class PlainImageDetector:
    """Linear classifier of images: a score above ``threshold`` means protected.

    Attributes:
        mean, scale: float64 (K,), standardize the statistics.
        weights: float64 (K,), of the standardized statistics.
        plain_refused: share of plain test images that are refused, with their number and 95% Wilson interval.
        protected_refused: the same for protected test images.
    """

    mean: Tensor
    scale: Tensor
    weights: Tensor
    bias: float
    threshold: float
    plain_refused: dict[str, Any]
    protected_refused: dict[str, Any]

    def scores(self, images: Tensor) -> Tensor:
        """Scores float64 (N,) of images uint8 (N, C, H, W)."""
        parts = [self._score_part(part) for part in _split(images)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _score_part(self, images: Tensor) -> Tensor:
        return self._score_statistics(_statistics(images))

    def _score_statistics(self, values: Tensor) -> Tensor:
        zscores = _standardize(values, self.mean.to(values.device), self.scale.to(values.device))
        scores: Tensor = zscores @ self.weights.to(values.device) + self.bias
        return scores

    def is_protected(self, images: Tensor) -> Tensor:
        """Whether each of the images uint8 (N, C, H, W) looks protected, bool (N,)."""
        return self.scores(images) > self.threshold

    def dump(self) -> dict[str, Any]:
        """JSON data for :func:`restore_detector`."""
        return {name: value.tolist() if isinstance(value, Tensor) else value for name, value in vars(self).items()}


@dataclass(frozen=True)
class _TracedDetector(PlainImageDetector):
    trace: nn.Module

    def _score_part(self, images: Tensor) -> Tensor:
        scores: Tensor = self.trace(images)
        return scores


class _Scores(nn.Module):
    def __init__(self, detector: PlainImageDetector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> Tensor:
        return self.detector._score_part(images)


def trace_detector(detector: PlainImageDetector, images: Tensor) -> PlainImageDetector:
    """The same detector, whose statistics take Python's lock once, see :func:`raypp.models.tracing.trace_forward`."""
    return _TracedDetector(**vars(detector), trace=trace_forward(_Scores(detector), images))


def restore_detector(data: dict[str, Any]) -> PlainImageDetector:
    """Build a detector from its ``dump``; raises KeyError, TypeError or ValueError for invalid data."""
    mean, scale, weights = (torch.tensor(data[name], dtype=torch.float64) for name in ("mean", "scale", "weights"))
    bias, threshold = float(data["bias"]), float(data["threshold"])
    if not mean.shape == scale.shape == weights.shape or not math.isfinite(bias + threshold):
        raise ValueError("the numbers of a guard do not fit together")
    plain, protected = dict(data["plain_refused"]), dict(data["protected_refused"])
    return PlainImageDetector(mean, scale, weights, bias, threshold, plain, protected)


@torch.inference_mode()
def calibrate_detector(
    plain: Tensor, protected: Tensor, test_plain: Tensor, test_protected: Tensor
) -> PlainImageDetector | None:
    """Fit a detector; None if there are fewer than ``2 * LEAST`` images, or no test images.

    Args:
        plain, protected: uint8 (N, C, H, W); the first half sets the weights, the second half the threshold.
        test_plain, test_protected: other images, to measure the refusal rates on.
    """
    half = len(plain) // 2
    if half < LEAST or not len(test_plain):
        return None
    values = torch.cat((statistics(protected[:half]), _statistics_of_variants(plain[:half])))
    mean, scale = values.mean(0), values.std(0).clamp_min(1e-6)
    weights, bias = _fit_logistic_regression(_standardize(values, mean, scale), half)
    detector = PlainImageDetector(mean.cpu(), scale.cpu(), weights, bias, 0.0, {}, {})
    lowest = float(detector.scores(protected[half:]).quantile(MAX_FALSE_REJECTIONS))
    highest = float(
        detector._score_statistics(_statistics_of_variants(plain[half:])).quantile(1 - MAX_FALSE_REJECTIONS)
    )
    # Where the two kinds overlap, the allowed share of protected images is refused.
    detector = replace(detector, threshold=(lowest + highest) / 2 if highest < lowest else lowest)
    return replace(
        detector,
        plain_refused=_refusal_rate(detector, test_plain),
        protected_refused=_refusal_rate(detector, test_protected),
    )


def _standardize(values: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    return ((values - mean) / scale).clamp(-MAX_ZSCORE, MAX_ZSCORE)


def _fit_logistic_regression(zscores: Tensor, num_protected: int) -> tuple[Tensor, float]:
    """Weights and bias; the first ``num_protected`` rows are protected, and both classes have the same total weight."""
    from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]

    is_protected = torch.arange(len(zscores)) < num_protected
    inverse_ridge = 1 / (2 * RIDGE * len(zscores))  # RIDGE weighs the squared norm against the mean loss
    model = LogisticRegression(C=inverse_ridge, class_weight="balanced", solver="newton-cholesky")
    model.fit(zscores.cpu().numpy(), is_protected.numpy())
    return torch.from_numpy(model.coef_[0]), float(model.intercept_[0])


def _refusal_rate(detector: PlainImageDetector, images: Tensor) -> dict[str, Any]:
    count, num = int((~detector.is_protected(images)).sum()), len(images)
    return {"share": count / num, "num": num, "interval": list(wilson_interval(count, num))}


def statistics(images: Tensor) -> Tensor:
    """Statistics float64 (N, K) of images uint8 (N, C, H, W) of any size.

    Per channel: the histogram, mean and deviation, the share of extreme values, and the mean absolute difference of
    pixels one, two and four apart. Across channels: the mean absolute difference.
    """
    return torch.cat([_statistics(part) for part in _split(images)])


def _split(images: Tensor) -> tuple[Tensor, ...]:
    batches: tuple[Tensor, ...] = images.split(max(1, PART_VALUES // max(1, images.shape[1:].numel())))
    return batches


def _statistics(images: Tensor) -> Tensor:
    values = images.float()
    num, channels = images.shape[:2]
    rows = torch.arange(num * channels, device=images.device).view(num, channels, 1)
    bins = images.flatten(2).long() + 256 * rows
    histogram = bins.flatten().bincount(minlength=256 * rows.numel()).view(num, channels, 256) / bins.shape[2]
    levels = torch.arange(256, device=images.device) / 255
    mean = histogram @ levels
    deviation = (histogram * (levels - mean[..., None]) ** 2).sum(2).sqrt()
    extremes = histogram[..., 0] + histogram[..., 255]
    features = [histogram.unflatten(2, (BINS, -1)).sum(3).flatten(1), extremes, mean, deviation]
    for step in (1, 2, 4):
        for dim in (2, 3):
            if values.shape[dim] > step:
                length = values.shape[dim] - step
                differences = values.narrow(dim, step, length) - values.narrow(dim, 0, length)
                features.append(differences.abs().mean(dim=(2, 3)) / 255)
    if channels > 1:
        features.append((values - values.roll(1, dims=1)).abs().mean(dim=(2, 3)) / 255)
    return torch.cat(features, dim=1).double()


def _statistics_of_variants(plain: Tensor) -> Tensor:
    """Statistics (4N, K) of plain images and their variants, see :func:`_variants`."""
    batches = [[_statistics(variant) for variant in _variants(batch)] for batch in _split(plain)]
    return torch.cat([torch.cat(variants) for variants in zip(*batches, strict=True)])


def _variants(plain: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Plain images as clients may upload them by mistake: unchanged, magnified, gray, negative."""
    height, width = plain.shape[2:]
    center = plain[:, :, height // 4 : height - height // 4, width // 4 : width - width // 4].float()
    magnified = F.interpolate(center, size=(height, width), mode="bilinear").round().to(torch.uint8)
    gray = plain.float().mean(1, keepdim=True).round().to(torch.uint8).expand_as(plain)
    return plain, magnified, gray, 255 - plain
