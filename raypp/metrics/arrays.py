"""Metrics of images as NumPy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from raypp.metrics.matchers import COSINE, EDGES, PIXELS, build_matchers
from raypp.metrics.retrieval import reidentify
from raypp.utils.errors import ConfigError, DataError
from raypp.utils.images import Pixels, as_pixels, channels_first

MATCHERS = (PIXELS, COSINE, EDGES)


def reidentified(estimates: Any, originals: Any, gallery: Any, matcher: str = COSINE) -> np.ndarray:
    """Whether each estimate re-identifies its original: no other image of the gallery is as similar to it.

    A tie with another image counts as a failure; a copy of the original is not another image. An estimate without
    contrast has no direction and no edges, so ``cosine`` and ``edges`` do not re-identify it. The arrays are uint8, so
    no value is NaN.

    Args:
        estimates: reconstructions uint8 (N, H, W, C).
        originals: their plain images, of the same shape.
        gallery: candidates uint8 (M, H, W, C), which contain the originals.
        matcher: similarity: ``pixels`` (squared difference), ``cosine`` (of images minus the mean of the gallery, as
            attacks without validation images have it) or ``edges`` (cosine of edge maps).

    Returns:
        bool (N,); its mean is the re-identification rate.

    Raises:
        ConfigError: ``matcher`` is unknown.
        DataError: an array has another form, or the gallery lacks an original.
    """
    if matcher not in MATCHERS:
        raise ConfigError(f"matcher is {matcher!r}; allowed: {', '.join(MATCHERS)}")
    arrays = {"estimates": estimates, "originals": originals, "gallery": gallery}
    pixels = {name: as_pixels(array, name) for name, array in arrays.items()}
    plain, candidates = pixels["originals"], pixels["gallery"]
    if pixels["estimates"].shape != plain.shape:
        raise DataError(f"estimates are {pixels['estimates'].shape} and originals {plain.shape}; allowed is one shape")
    if candidates.shape[1:] != plain.shape[1:]:
        raise DataError(f"gallery images are {candidates.shape[1:]}, originals {plain.shape[1:]}; allowed is one shape")
    images = channels_first(candidates)
    ranks = reidentify(
        channels_first(pixels["estimates"]), images, torch.from_numpy(_indices(plain, candidates)),
        torch.zeros(len(images), dtype=torch.int64), build_matchers(images)[matcher],
    )  # fmt: skip
    return (ranks.all == 0).numpy()


def _indices(originals: Pixels, gallery: Pixels) -> np.ndarray:
    """Index of each original in the gallery, int64 (N,); raises DataError if one is missing."""
    index = {image.tobytes(): i for i, image in enumerate(gallery)}
    indices = [index.get(image.tobytes(), -1) for image in originals]
    if missing := indices.count(-1):
        raise DataError(f"gallery lacks {missing} of {len(originals)} originals; allowed is one with all of them")
    return np.array(indices, dtype=np.int64)
