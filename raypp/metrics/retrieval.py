"""Re-identification: the rank of the original among all images of a gallery."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from raypp.metrics.image import in_parts

TIE_TOLERANCE = 1e-12  # rounding of a squared distance in float64, relative to the squared norms
COPY_TOLERANCE = 1e-9  # rounding of a product in float64
NEAR_DUPLICATE_PSNR = 25.0  # dB: a root mean squared difference of 14 gray levels

Features = Callable[[Tensor], Tensor]
"""Maps images (n, C, H, W) to features float64 (n, D); their squared distance ranks a gallery."""


@dataclass(frozen=True)
class RetrievalRanks:
    """Rank of each query's original among the gallery's images, nearest first; 0 is a top-1 hit.

    Attributes:
        all: int64 (N,), in the whole gallery.
        same_class: int64 (N,), among the images of the original's class; excludes the information of the class.
        distinct: int64 (N,), in the gallery without near-duplicates of the original.
        num_gallery: number of images in the whole gallery, M.
    """

    all: Tensor
    same_class: Tensor
    distinct: Tensor
    num_gallery: int

    def top(self, num: int) -> Tensor:
        """Return whether each original is among the ``num`` nearest images, float (N,)."""
        return (self.all < num).float()

    def top_in_gallery_of(self, size: int) -> Tensor:
        """Return the probability of rank 0 in a smaller gallery, float64 (N,) in [0, 1].

        The smaller gallery has the original and ``size - 1`` others, drawn without replacement. With r nearer images
        among M - 1 others, the probability is C(M - 1 - r, size - 1) / C(M - 1, size - 1).

        Args:
            size: 1 to M.

        Raises:
            ValueError: ``size`` is larger than the gallery.
        """
        if not 1 <= size <= self.num_gallery:
            raise ValueError(f"size is {size}; allowed is 1 to {self.num_gallery}, the images of the gallery")
        farther = (self.num_gallery - self.all).double()  # including the original
        probability = torch.exp(
            torch.lgamma(farther)
            - torch.lgamma((farther - size + 1).clamp_min(1))
            - math.lgamma(self.num_gallery)
            + math.lgamma(self.num_gallery - size + 1)
        )
        return torch.where(farther >= size, probability.clamp_max(1), torch.zeros_like(probability))

    def bits_identified(self) -> Tensor:
        """Return log2 M - log2(rank + 1), float64 (N,): all of log2 M bits for rank 0, and 0 for the last rank.

        A random order has about 1.44 bits, because the mean logarithm is below the logarithm of the mean.
        """
        return math.log2(self.num_gallery) - torch.log2(self.all.double() + 1)


def flatten_pixels(images: Tensor) -> Tensor:
    """Return the values of each image, float64 (N, D); uint8 images become integers with exact distances."""
    return images.flatten(1).double()


def near_duplicates(images: Tensor, gallery: Tensor) -> Tensor:
    """Return which of the gallery's images have a PSNR of at least ``NEAR_DUPLICATE_PSNR`` with each image.

    Args:
        images: uint8 (N, C, H, W).
        gallery: uint8 (M, C, H, W).

    Returns:
        bool (N, M); true for copies too.
    """
    limit = 255**2 * 10 ** (-NEAR_DUPLICATE_PSNR / 10) * images[0].numel()
    rows = []
    for part in in_parts(images):
        flat = flatten_pixels(part)
        norms = flat.square().sum(1)[:, None]
        columns = []
        for candidates in map(flatten_pixels, in_parts(gallery)):
            columns.append(candidates.square().sum(1) - 2 * flat @ candidates.t() + norms <= limit)
        rows.append(torch.cat(columns, dim=1))
    return torch.cat(rows)


def reidentify(
    estimates: Tensor,
    gallery: Tensor,
    truth: Tensor,
    labels: Tensor,
    features: Features = flatten_pixels,
    duplicates: Tensor | None = None,
) -> RetrievalRanks:
    """Rank the originals of estimates in a gallery by squared feature distance, in bounded memory.

    Distances are float64, so those of integers are exact.

    Args:
        estimates: (N, C, H, W).
        gallery: (M, C, H, W) of the same dtype; contains the originals.
        truth: int64 (N,), index of each original in the gallery.
        labels: int64 (M,), classes of the gallery.
        features: see ``Features``.
        duplicates: bool (N, M), near-duplicates of each original for ``distinct``; None for none.

    Returns:
        the ranks. Ties count against the original, except ties with copies of it: an estimate at the same distance
        from two images identifies neither. An estimate that is not a number has the last rank.
    """
    if duplicates is None:
        duplicates = torch.zeros(1, 1, dtype=torch.bool, device=gallery.device).expand(len(truth), len(gallery))
    # The product with one random direction detects copies of the original.
    direction = torch.randn(gallery[0].numel(), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    direction = direction.to(gallery.device)
    signatures = torch.cat([flatten_pixels(part) @ direction for part in in_parts(gallery)])
    columns = (in_parts(values, estimates) for values in (estimates, truth, duplicates))
    parts = [
        _rank(part, own, part_duplicates, gallery, labels, signatures, features)
        for part, own, part_duplicates in zip(*columns, strict=True)
    ]
    ranks, ranks_in_class, ranks_distinct = (torch.cat(values) for values in zip(*parts, strict=True))
    return RetrievalRanks(ranks, ranks_in_class, ranks_distinct, len(gallery))


def _rank(
    estimates: Tensor,
    truth: Tensor,
    duplicates: Tensor,
    gallery: Tensor,
    labels: Tensor,
    signatures: Tensor,
    features: Features,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the ranks of one part of the estimates: in the gallery, in the class, and without near-duplicates."""
    queries, originals = features(estimates), features(gallery[truth])
    # |e - g|^2 without |e|^2, which is the same for the whole gallery.
    squared_norms = originals.square().sum(1)
    distances = (squared_norms - 2 * (queries * originals).sum(1))[:, None]
    tolerance = TIE_TOLERANCE * (squared_norms + queries.square().sum(1))[:, None]
    ranks, ranks_in_class, ranks_distinct = (torch.zeros_like(truth) for _ in range(3))
    columns = (in_parts(values, gallery) for values in (gallery, labels, signatures, duplicates.t()))
    for part, classes, part_signatures, part_duplicates in zip(*columns, strict=True):
        candidates = features(part)
        is_farther = candidates.square().sum(1) - 2 * queries @ candidates.t() > distances + tolerance
        is_other = (part_signatures[None] - signatures[truth][:, None]).abs() > COPY_TOLERANCE
        is_nearer = ~is_farther & is_other  # NaN is not farther
        ranks += is_nearer.sum(1)
        ranks_in_class += (is_nearer & (classes[None] == labels[truth][:, None])).sum(1)
        ranks_distinct += (is_nearer & ~part_duplicates.t()).sum(1)
    return ranks, ranks_in_class, ranks_distinct
