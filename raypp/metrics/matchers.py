"""Matchers: the features by which a gallery image is most similar to a reconstruction.

Networks that learn by squared or absolute error shrink their estimates towards the mean image. Raw pixel distances then
prefer gallery images of low contrast; the centered cosine does not. LPIPS is a squared distance of features as well
(Zhang, Isola, Efros, Shechtman, Wang 2018, Eq. 1).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from raypp.metrics.image import edge_maps, lpips_available, lpips_features, mean_image
from raypp.metrics.retrieval import Features, flatten_pixels

LARGEST_DISTANCE = 4.0  # squared, of two vectors of norm 1

PIXELS, COSINE, EDGES, LPIPS = MATCHERS = ("pixels", "cosine", "edges", "lpips")
OWN_SCORES = "own scores"
"""In the place of a matcher: a matching attack ranks the gallery itself (``Attack.candidate_scores``)."""


def build_matchers(images: Tensor) -> dict[str, Features]:
    """Build all available matchers.

    Args:
        images: the attacker's images, uint8 (N, C, H, W); ``cosine`` subtracts their mean.

    Returns:
        features of uint8 images by the matcher's name: ``pixels``, ``cosine``, ``edges``, and ``lpips`` where its
        weights are available and sides have 32 pixels or more.
    """
    matchers: dict[str, Features] = {
        PIXELS: flatten_pixels,
        COSINE: partial(centered_directions, center=mean_image(images)),
        EDGES: _edge_features,
    }
    if lpips_available(images):
        matchers[LPIPS] = _lpips_features
    return matchers


def centered_directions(images: Tensor, center: Tensor) -> Tensor:
    """Return the directions of images minus ``center``, float64 (N, D + 1), see :func:`_mark_without_direction`.

    The squared distance of two directions is 2 - 2 cos.

    Args:
        images: uint8 (N, C, H, W).
        center: uint8 (C, H, W).
    """
    centered = flatten_pixels(images) - flatten_pixels(center[None].to(images.device))
    norms = centered.norm(dim=1, keepdim=True)
    return _mark_without_direction(torch.where(norms == 0, centered, centered / norms))


def _edge_features(images: Tensor) -> Tensor:
    return _mark_without_direction(edge_maps(images.float() / 255))


def _mark_without_direction(directions: Tensor) -> Tensor:
    """Append a value to vectors (N, D) of norm 1 or 0, so that 0 has the largest distance to all of norm 1.

    Without it, 0 is nearer than a vector at more than 60 degrees.
    """
    is_zero = (directions == 0).all(1, keepdim=True).double()
    return torch.cat((directions, is_zero * (LARGEST_DISTANCE - 1) ** 0.5), dim=1)


def _lpips_features(images: Tensor) -> Tensor:
    return lpips_features(images.float() / 255)
