"""Re-identification: the rank of the original among all images of a gallery."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from raypp.metrics.image import in_parts

TIE_TOLERANCE = 1e-12  # rounding of a squared distance in float64, relative to the squared norms
DUPLICATE_TOLERANCE = 1e-9  # rounding of a product in float64


@dataclass(frozen=True)
class RetrievalRanks:
    """Rank of each query's original among the gallery's images, nearest first; 0 is a top-1 hit.

    Attributes:
        all: int64 (N,), in the whole gallery.
        same_class: int64 (N,), among the images of the original's class; excludes the information of the class.
    """

    all: Tensor
    same_class: Tensor

    def top(self, num: int) -> Tensor:
        """Return whether each original is among the ``num`` nearest images, float (N,)."""
        return (self.all < num).float()


def flatten_pixels(images: Tensor) -> Tensor:
    """Return the values of each image, float64 (N, D); uint8 images become integers with exact distances."""
    return images.flatten(1).double()


def reidentify(
    estimates: Tensor,
    gallery: Tensor,
    truth: Tensor,
    labels: Tensor,
    features: Callable[[Tensor], Tensor] = flatten_pixels,
) -> RetrievalRanks:
    """Rank the originals of estimates in a gallery by squared feature distance, in bounded memory.

    Args:
        estimates: (N, C, H, W).
        gallery: (M, C, H, W) of the same dtype; contains the originals.
        truth: int64 (N,), index of each original in the gallery.
        labels: int64 (M,), classes of the gallery.
        features: maps images (n, C, H, W) to float64 (n, D).

    Returns:
        the ranks. Ties count against the original, except ties with copies of it: an estimate at the same distance
        from two images identifies neither.
    """
    parts = [
        _rank(*part, gallery, labels, features)
        for part in zip(in_parts(estimates), in_parts(truth, estimates), strict=True)
    ]
    return RetrievalRanks(torch.cat([ranks for ranks, _ in parts]), torch.cat([ranks for _, ranks in parts]))


def _rank(
    estimates: Tensor, truth: Tensor, gallery: Tensor, labels: Tensor, features: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the ranks of one part of the estimates, in the whole gallery and in the original's class."""
    queries, originals = features(estimates), features(gallery[truth])
    # The product with one random direction detects copies of the original.
    direction = torch.randn(queries.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    direction = direction.to(queries.device)
    signatures = (originals @ direction)[:, None]
    # |e - g|^2 without |e|^2, which is the same for the whole gallery.
    squared_norms = originals.square().sum(1)
    distances = (squared_norms - 2 * (queries * originals).sum(1))[:, None]
    tolerance = TIE_TOLERANCE * (squared_norms + queries.square().sum(1))[:, None]
    ranks, ranks_in_class = torch.zeros_like(truth), torch.zeros_like(truth)
    for part, classes in zip(in_parts(gallery), in_parts(labels, gallery), strict=True):
        candidates = features(part)
        is_nearer = candidates.square().sum(1) - 2 * queries @ candidates.t() <= distances + tolerance
        is_nearer &= ((candidates @ direction)[None] - signatures).abs() > DUPLICATE_TOLERANCE
        ranks += is_nearer.sum(1)
        ranks_in_class += (is_nearer & (classes[None] == labels[truth][:, None])).sum(1)
    return ranks, ranks_in_class
