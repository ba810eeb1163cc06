"""Re-identification: the rank of the original among all images of a gallery."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from raypp.metrics.image import in_parts

TIE_TOLERANCE = 1e-12  # rounding of a score in float64, relative to the largest of a query
COPY_TOLERANCE = 1e-9  # rounding of a product in float64
NEAR_DUPLICATE_CORRELATION = 0.9  # on CIFAR-10 two thirds of such pairs show one photograph; from 0.95 all of them
SCORE_VALUES = 2**24  # scores of queries for a gallery in memory at a time

Features = Callable[[Tensor], Tensor]
"""Maps images (n, C, H, W) to features float64 (n, D); their squared distance ranks a gallery."""


@dataclass(frozen=True)
class RetrievalRanks:
    """Rank of each query's original among the gallery's images, nearest first; 0 is a top-1 hit.

    Attributes:
        all: int64 (N,), in the whole gallery.
        same_class: int64 (N,), among the images of the original's class; excludes the information of the class.
        num_same_class: int64 (N,), number of other images of the original's class that are no copies of it.
        num_gallery: number of images in the whole gallery, M.
    """

    all: Tensor
    same_class: Tensor
    num_same_class: Tensor
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

    def top_in_class(self) -> Tensor:
        """Return whether each original has rank 0 in its class, float (N,); NaN where the class has no other image."""
        hits = (self.same_class == 0).float()
        return torch.where(self.num_same_class > 0, hits, torch.full_like(hits, torch.nan))

    def bits_identified(self) -> Tensor:
        """Return log2 M - log2(rank + 1), float64 (N,): all of log2 M bits for rank 0, and 0 for the last rank.

        A random order has about 1.44 bits, because the mean logarithm is below the logarithm of the mean.
        """
        return math.log2(self.num_gallery) - torch.log2(self.all.double() + 1)


def flatten_pixels(images: Tensor) -> Tensor:
    """Return the values of each image, float64 (N, D); uint8 images become integers with exact distances."""
    return images.flatten(1).double()


def has_near_duplicate(images: Tensor, others: Tensor) -> Tensor:
    """Return whether any of ``others`` or their mirror images is a near-duplicate of each image, bool (N,).

    Two images are near-duplicates if their values correlate by at least ``NEAR_DUPLICATE_CORRELATION``. Brightness and
    contrast do not count.

    Args:
        images: uint8 (N, C, H, W).
        others: uint8 (M, C, H, W).
    """
    has_one = torch.zeros(len(images), dtype=torch.bool, device=images.device)
    for part in in_parts(others):
        candidates = torch.cat((_standardized(part), _standardized(part.flip(3))))
        rows = [_standardized(queries) @ candidates.t() for queries in query_batches(images, len(candidates))]
        has_one |= torch.cat([(row >= NEAR_DUPLICATE_CORRELATION).any(1) for row in rows])
    return has_one


def _standardized(images: Tensor) -> Tensor:
    """Return the values of each image less their mean, float32 (N, D + 1) of norm 1; a plain color has its own axis."""
    values = images.flatten(1).float()
    centered = values - values.mean(1, keepdim=True)
    norms = centered.norm(dim=1, keepdim=True)
    is_flat = (norms == 0).float()
    return torch.cat((centered / (norms + is_flat), is_flat), dim=1)


def query_batches(queries: Tensor, num_gallery: int) -> tuple[Tensor, ...]:
    """Split queries (N, ...) into batches whose values and scores for a gallery fit into bounded memory."""
    size = min(len(in_parts(queries)[0]), SCORE_VALUES // max(1, num_gallery))
    batches: tuple[Tensor, ...] = queries.split(max(1, size))
    return batches


def reidentify(
    estimates: Tensor, gallery: Tensor, truth: Tensor, labels: Tensor, features: Features = flatten_pixels
) -> RetrievalRanks:
    """Rank the originals of estimates in a gallery by squared feature distance, in bounded memory.

    Distances are float64, so those of integers are exact.

    Args:
        estimates: (N, C, H, W).
        gallery: (M, C, H, W) of the same dtype; contains the originals.
        truth: int64 (N,), index of each original in the gallery.
        labels: int64 (M,), classes of the gallery.
        features: see ``Features``.

    Returns:
        the ranks, see :func:`rank_by_scores`. An estimate that is not a number has the last rank.

    Raises:
        ValueError: the gallery is empty.
    """
    batches = query_batches(estimates, len(gallery))
    return rank_by_scores((negative_distances(batch, gallery, features) for batch in batches), truth, gallery, labels)


def negative_distances(queries: Tensor, candidates: Tensor, features: Features = flatten_pixels) -> Tensor:
    """Return minus the squared feature distances, float64 (n, M), without the queries' squared norms.

    Args:
        queries: (n, C, H, W); one that is not a number has no scores, which are NaN.
        candidates: (M, C, H, W) of the same dtype.
        features: see ``Features``.
    """
    compared = features(queries)
    columns = []
    for part in map(features, in_parts(candidates)):
        columns.append(2 * compared @ part.t() - part.square().sum(1))
    scores = torch.cat(columns, dim=1)
    scores[queries.flatten(1).isnan().any(1)] = torch.nan  # features may hide it
    return scores


def rank_by_scores(scores: Iterable[Tensor], truth: Tensor, gallery: Tensor, labels: Tensor) -> RetrievalRanks:
    """Rank the originals in a gallery by scores of its images.

    Args:
        scores: batches (n, M) of the scores of N queries, in their order; the largest has rank 0.
        truth: int64 (N,), index of each original in the gallery.
        gallery: (M, C, H, W).
        labels: int64 (M,), classes of the gallery.

    Returns:
        the ranks. Ties count against the original, except ties with copies of it: equal scores of two different images
        identify neither. A score of NaN or -inf excludes an image. An excluded original has the last rank.

    Raises:
        ValueError: the gallery is empty.
    """
    if len(gallery) == 0:
        raise ValueError("the gallery has 0 images; allowed is at least 1")
    copies = _copy_numbers(gallery)
    parts, start = [], 0
    for batch in scores:
        indices = truth[start : start + len(batch)]
        parts.append(_rank(batch.to(gallery.device), indices, copies, labels))
        start += len(batch)
    ranks, ranks_in_class, num_in_class = (torch.cat(values) for values in zip(*parts, strict=True))
    return RetrievalRanks(ranks, ranks_in_class, num_in_class, len(gallery))


def _copy_numbers(images: Tensor) -> Tensor:
    """Return a number of each image, int64 (N,), which copies share. Their product with a random direction is equal."""
    direction = torch.randn(images[0].numel(), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    direction = direction.to(images.device)
    products, order = torch.cat([flatten_pixels(part) @ direction for part in in_parts(images)]).sort()
    numbers = torch.zeros_like(order)
    numbers[order[1:]] = (products.diff() > COPY_TOLERANCE).cumsum(0)
    return numbers


def _rank(scores: Tensor, truth: Tensor, copies: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the ranks of a batch of queries in the gallery and in the class, and the number of rivals in the class."""
    scores = scores.nan_to_num(-torch.inf, torch.inf, -torch.inf)
    own = scores.gather(1, truth[:, None])
    finite = scores.nan_to_num(0, 0, 0)
    tolerance = TIE_TOLERANCE * torch.maximum(finite.amax(1), -finite.amin(1))[:, None]
    is_nearer = scores >= own - tolerance
    is_rival = copies[None] != copies[truth][:, None]
    in_class = labels[None] == labels[truth][:, None]
    num_rivals = (is_rival & in_class).sum(1)
    is_other = torch.ones_like(is_rival).scatter_(1, truth[:, None], False)
    is_nearer &= torch.where(own == -torch.inf, is_other, is_rival)
    return is_nearer.sum(1), (is_nearer & in_class).sum(1), num_rivals
