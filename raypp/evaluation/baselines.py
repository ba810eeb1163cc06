"""Baselines: estimates that no attack is needed for, and tests whether an attack is more similar to the originals."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from raypp.attacks.base import required
from raypp.attacks.image_fitting import fit_images
from raypp.attacks.target import Target
from raypp.metrics.image import in_parts, mean_image, ssim_for_loss
from raypp.metrics.matchers import COSINE, OWN_SCORES
from raypp.metrics.statistics import mcnemar_test, paired_t_test
from raypp.utils.images import to_uint8

FIT_STEPS, FIT_PASSES, FIT_LR = 400, 40, 0.01  # of the images fitted by SSIM: most steps, and passes over the images
FIT_BATCH_SIZES, FIT_VALUES = (16, 200), 2**20  # images per step: within these limits, by image values in memory
MEAN_IMAGE, RANDOM_IMAGE, FITTED_IMAGE = "mean image", "random image", "fitted image"
CLASS_MEAN, CLASS_IMAGE = "class mean", "fitted class image"
NEAREST_IMAGE = "nearest training image"
BLIND = (MEAN_IMAGE, RANDOM_IMAGE, FITTED_IMAGE, CLASS_MEAN, CLASS_IMAGE)
"""Baselines that use at most the class of a query."""
BASELINE_MATCHER = COSINE
SIGNIFICANCE = 0.05


def baselines(target: Target, seed: int = 0) -> dict[str, Tensor]:
    """Estimates uint8 (N, C, H, W) that do not use the protected image.

    ``class mean`` and ``fitted class image`` use the class, which the cloud knows. The fitted image has the largest
    mean SSIM with the attacker's images of the class; without classes, ``fitted image`` is that of all images.
    ``nearest training image`` uses the original: it is the most similar of the attacker's images, an upper bound for
    prior knowledge.
    """
    plain = target.plain
    images = required(target.access.images).to(plain.device)
    mean = mean_image(images)
    generator = torch.Generator().manual_seed(seed)
    estimates = {
        MEAN_IMAGE: mean.expand(len(plain), *mean.shape),
        RANDOM_IMAGE: images[torch.randint(len(images), (len(plain),), generator=generator).to(plain.device)],
    }
    if target.classes and target.access.labels is not None:
        estimates[CLASS_MEAN] = _class_means(target)[target.labels]
        estimates[CLASS_IMAGE] = fitted_class_image(target, seed)
    else:
        group = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        estimates[FITTED_IMAGE] = _fit_by_ssim(mean[None], images, group, seed).expand(len(plain), *mean.shape)
    nearest = torch.cat([_nearest(part, images) for part in in_parts(plain)])
    estimates[NEAREST_IMAGE] = images[nearest]
    return estimates


def fitted_class_image(target: Target, seed: int = 0) -> Tensor:
    """The baseline ``fitted class image`` uint8 (N, C, H, W) of a target with classes."""
    device = target.plain.device
    images, labels = (required(values).to(device) for values in (target.access.images, target.access.labels))
    return _fit_by_ssim(_class_means(target), images, labels, seed)[target.labels]


def _class_means(target: Target) -> Tensor:
    """Mean images uint8 (K, C, H, W) of the classes; the mean of all images for a class without any."""
    device = target.plain.device
    images, labels = (required(values).to(device) for values in (target.access.images, target.access.labels))
    members = [labels == index for index in range(len(target.classes))]
    return torch.stack([mean_image(images, mask if mask.any() else None) for mask in members])


def _fit_by_ssim(means: Tensor, images: Tensor, members: Tensor, seed: int) -> Tensor:
    """Images uint8 (K, C, H, W), from the mean of each group to the largest mean SSIM with its members."""
    smallest, largest = FIT_BATCH_SIZES
    batch_size = max(smallest, min(largest, FIT_VALUES // means[0].numel(), len(images)))
    steps = min(FIT_STEPS, FIT_PASSES * -(-len(images) // batch_size))
    fitted = fit_images(
        means.float() / 255, images, members, lambda estimates, originals: -ssim_for_loss(estimates, originals).mean(),
        steps=steps, lr=FIT_LR, batch_size=batch_size, seed=seed,
    )  # fmt: skip
    return to_uint8(fitted)


def _nearest(images: Tensor, others: Tensor) -> Tensor:
    """Indices int64 (n,) of the nearest of ``others`` to each image, both uint8."""
    queries = images.flatten(1).float()
    min_distances = torch.full((len(images),), torch.inf, device=images.device)
    nearest = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    start = 0
    for part in in_parts(others):
        flat = part.flatten(1).float()
        distances, index = (flat.square().sum(1) - 2 * queries @ flat.t()).min(1)
        nearest = torch.where(distances < min_distances, index + start, nearest)
        min_distances = torch.minimum(min_distances, distances)
        start += len(part)
    return nearest


def above_baseline_p_values(
    scores: Mapping[str, Tensor], baseline_scores: Mapping[str, Mapping[str, Tensor]], matcher: str
) -> dict[str, float]:
    """Test whether an attack's estimates are more similar to the originals than the best blind baseline's.

    Queries are paired: the re-identified ones by McNemar's exact test, SSIM and edges by the paired t-test. For each
    metric, the baseline is the one of ``BLIND`` with the largest mean.

    Args:
        scores: values (n,) of the attack's metrics.
        baseline_scores: values (N,) by baseline and metric, with N >= n.
        matcher: the attack's matcher, which the baseline has too; without one, the baseline has its own.

    Returns:
        one-sided p-values by metric, not adjusted for the number of tests.
    """
    p_values = {}
    for metric in ("reidentified", "ssim_invariant", "edges"):
        key = f"reidentified_{matcher}" if metric == "reidentified" and matcher != OWN_SCORES else metric
        values = scores[metric]
        blind = [baseline_scores[name][key][: len(values)] for name in BLIND if name in baseline_scores]
        best = max(blind, key=lambda candidate: float(candidate.double().mean()))
        test = mcnemar_test if metric == "reidentified" else paired_t_test
        p_values[metric] = test(values.numpy(), best.numpy())
    return p_values
