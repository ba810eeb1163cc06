"""Tells protected images from plain ones, so that a service can refuse what a client uploaded by mistake.

A linear score of simple statistics, fitted to one protection: a protected image looks like nothing else. It is no
defence against somebody who wants to send a plain image; it catches a client that forgot to protect one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from raypp.metrics.statistics import wilson_interval

BINS = 16
LEAST = 100  # images of each kind, both to fit to and to set the threshold by
REFUSED = 0.001  # of protected images, at most, on those that the threshold is set by
RIDGE = 1e-3
PART_VALUES = 2**22  # values of images whose statistics are computed at a time; each takes some 30 bytes meanwhile


@dataclass(frozen=True)
class PlainImageDetector:
    """A score per image: above ``threshold`` it looks protected.

    Attributes:
        weights: of each standardised statistic, float64 (K,); ``mean`` and ``scale`` standardise.
        plain_refused: share of plain test images that it refuses, with its number and 95% Wilson interval.
        protected_refused: share of protected test images that it refuses, likewise.
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
        return self.scores_of(statistics(images))

    def scores_of(self, values: Tensor) -> Tensor:
        """Scores float64 (N,) of images whose :func:`statistics` are ``values`` (N, K)."""
        standard = (values - self.mean.to(values.device)) / self.scale.to(values.device)
        scores: Tensor = standard.clamp(-10, 10) @ self.weights.to(values.device) + self.bias
        return scores

    def is_protected(self, images: Tensor) -> Tensor:
        """Whether each of the images uint8 (N, C, H, W) looks protected, bool (N,)."""
        return self.scores(images) > self.threshold

    def dump(self) -> dict[str, Any]:
        """As plain data, from which :func:`restore` makes it again."""
        vectors = {name: getattr(self, name).tolist() for name in ("mean", "scale", "weights")}
        numbers = {name: getattr(self, name) for name in ("bias", "threshold", "plain_refused", "protected_refused")}
        return vectors | numbers


def restore_detector(data: dict[str, Any]) -> PlainImageDetector:
    """The guard that ``Guard.dump`` described; raises KeyError, TypeError or ValueError if it describes none."""
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
    """Fit a guard; None where there are too few images.

    Args:
        plain, protected: uint8 (N, C, H, W) to fit to: one half sets the weights, the other the threshold.
        test_plain, test_protected: others, by which its rates are measured.
    """
    half = len(plain) // 2
    if half < LEAST or not len(test_plain):
        return None
    x = torch.cat((statistics(protected[:half]), _statistics_of_variants(plain[:half])))
    mean, scale = x.mean(0), x.std(0).clamp_min(1e-6)
    weights, bias = _logistic(((x - mean) / scale).clamp(-10, 10), half)
    unset = PlainImageDetector(mean.cpu(), scale.cpu(), weights.cpu(), bias, 0.0, {}, {})
    lowest = float(unset.scores(protected[half:]).quantile(REFUSED))
    highest = float(unset.scores_of(_statistics_of_variants(plain[half:])).quantile(1 - REFUSED))
    # Between the two where they are apart; else as many protected images as allowed are refused.
    threshold = (lowest + highest) / 2 if highest < lowest else lowest
    guard = PlainImageDetector(mean.cpu(), scale.cpu(), weights.cpu(), bias, threshold, {}, {})
    return PlainImageDetector(
        guard.mean, guard.scale, guard.weights, bias, threshold,
        _rate(int((~guard.is_protected(test_plain)).sum()), len(test_plain)),
        _rate(int((~guard.is_protected(test_protected)).sum()), len(test_protected)),
    )  # fmt: skip


def statistics(images: Tensor) -> Tensor:
    """What the score is made of, float64 (N, K), of images uint8 (N, C, H, W) of any size: per channel the histogram
    and the mean steps to neighbours one, two and four pixels away, and across channels the mean difference.

    Memory holds ``PART_VALUES`` values at a time.
    """
    return torch.cat([_statistics(part) for part in _parts(images)])


def _parts(images: Tensor) -> tuple[Tensor, ...]:
    parts: tuple[Tensor, ...] = images.split(max(1, PART_VALUES // max(1, images.shape[1:].numel())))
    return parts


def _statistics(images: Tensor) -> Tensor:
    values = images.float()
    num, channels = images.shape[:2]
    rows = torch.arange(num * channels, device=images.device).view(num, channels, 1)
    places = images.flatten(2).long() + 256 * rows
    shares = places.flatten().bincount(minlength=256 * rows.numel()).view(num, channels, 256) / places.shape[2]
    levels = torch.arange(256, device=images.device) / 255
    mean = shares @ levels
    deviation = (shares * (levels - mean[..., None]) ** 2).sum(2).sqrt()
    parts = [shares.unflatten(2, (BINS, -1)).sum(3).flatten(1), shares[..., 0] + shares[..., 255], mean, deviation]
    for step in (1, 2, 4):
        for dim in (2, 3):
            if values.shape[dim] > step:
                moved = values.narrow(dim, step, values.shape[dim] - step)
                still = values.narrow(dim, 0, values.shape[dim] - step)
                parts.append((moved - still).abs().mean(dim=(2, 3)) / 255)
    if channels > 1:
        parts.append((values - values.roll(1, dims=1)).abs().mean(dim=(2, 3)) / 255)
    return torch.cat(parts, dim=1).double()


def _statistics_of_variants(plain: Tensor) -> Tensor:
    """Statistics (4N, K) of plain images as clients send them by mistake: as they are, magnified, grey, negative."""
    parts = [[_statistics(variant) for variant in _variants(part)] for part in _parts(plain)]
    return torch.cat([torch.cat(variants) for variants in zip(*parts, strict=True)])


def _variants(plain: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    height, width = plain.shape[2:]
    part = plain[:, :, height // 4 : height - height // 4, width // 4 : width - width // 4].float()
    magnified = F.interpolate(part, size=(height, width), mode="bilinear").round().to(torch.uint8)
    grey = plain.float().mean(1, keepdim=True).round().to(torch.uint8).expand_as(plain)
    return plain, magnified, grey, 255 - plain


def _logistic(x: Tensor, num_protected: int) -> tuple[Tensor, float]:
    """Weights and bias of a ridge logistic regression whose first rows are protected; both kinds weigh alike."""
    target = torch.zeros(len(x), dtype=x.dtype, device=x.device)
    target[:num_protected] = 1
    weight = torch.where(target == 1, 0.5 / num_protected, 0.5 / (len(x) - num_protected))
    with torch.inference_mode(False), torch.enable_grad():
        x, target, weight = x.clone(), target.clone(), weight.clone()
        theta = torch.zeros(x.shape[1] + 1, dtype=x.dtype, device=x.device, requires_grad=True)
        optimizer = torch.optim.LBFGS([theta], max_iter=200, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            logits = x @ theta[:-1] + theta[-1]
            losses = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
            loss: Tensor = (losses * weight).sum() + RIDGE * theta[:-1].square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
    found = theta.detach()
    return found[:-1], float(found[-1])


def _rate(count: int, num: int) -> dict[str, Any]:
    return {"share": count / num, "num": num, "interval": list(wilson_interval(count, num))}
