"""Re-identification: the rank of the original among all images of a gallery."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from raypp.metrics.image import in_parts

TIE_TOLERANCE = 1e-12  # float64's rounding of a squared distance, relative to the squared lengths it is computed from
DUPLICATE_TOLERANCE = 1e-9  # float64's rounding of a product


@dataclass(frozen=True)
class RetrievalRanks:
    """Where each query's original stands among the gallery's images, nearest first: 0 is a hit at the first guess.

    Attributes:
        all: int64 (N,), among the whole gallery.
        same_class: int64 (N,), among the images of the original's class, which takes away what the class alone tells.
    """

    all: Tensor
    same_class: Tensor

    def top(self, num: int) -> Tensor:
        """Whether each original is among the ``num`` nearest, as float (N,)."""
        return (self.all < num).float()


def flatten_pixels(images: Tensor) -> Tensor:
    """Values of each image, float64 (N, D); those of uint8 images stay whole numbers, whose distances are exact."""
    return images.flatten(1).double()


def reidentify(
    estimates: Tensor,
    gallery: Tensor,
    truth: Tensor,
    labels: Tensor,
    features: Callable[[Tensor], Tensor] = flatten_pixels,
) -> RetrievalRanks:
    """Look estimates up in a gallery by squared distance of their features, in bounded memory.

    Args:
        estimates: (N, C, H, W).
        gallery: (M, C, H, W) of the same type, the originals among them.
        truth: int64 (N,), each original's place in the gallery.
        labels: int64 (M,), the gallery's classes.
        features: gives float64 (n, D) of images (n, C, H, W).

    Returns:
        ranks; images equally near as the original count against it, unless they are the same image: who cannot tell two
        images apart has found neither.
    """
    parts = [
        _rank(*part, gallery, labels, features)
        for part in zip(in_parts(estimates), in_parts(truth, estimates), strict=True)
    ]
    return RetrievalRanks(torch.cat([ranks for ranks, _ in parts]), torch.cat([ranks for _, ranks in parts]))


def _rank(
    estimates: Tensor, truth: Tensor, gallery: Tensor, labels: Tensor, features: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """The ranks of one part of the estimates, among the whole gallery and among the original's class."""
    queries, originals = features(estimates), features(gallery[truth])
    # The same image is told by its product with one random direction.
    direction = torch.randn(queries.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    direction = direction.to(queries.device)
    marks = (originals @ direction)[:, None]
    # |e - g|^2 without |e|^2, which is the same for the whole gallery.
    lengths = originals.square().sum(1)
    own = (lengths - 2 * (queries * originals).sum(1))[:, None]
    tie = TIE_TOLERANCE * (lengths + queries.square().sum(1))[:, None]
    ranks, ranks_same = torch.zeros_like(truth), torch.zeros_like(truth)
    for part, classes in zip(in_parts(gallery), in_parts(labels, gallery), strict=True):
        others = features(part)
        nearer = others.square().sum(1) - 2 * queries @ others.t() <= own + tie
        nearer &= ((others @ direction)[None] - marks).abs() > DUPLICATE_TOLERANCE
        ranks += nearer.sum(1)
        ranks_same += (nearer & (classes[None] == labels[truth][:, None])).sum(1)
    return ranks, ranks_same
