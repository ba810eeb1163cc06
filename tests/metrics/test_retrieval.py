"""Ranks of originals by scores that are not finite, and in galleries without images."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import raypp
from raypp.metrics.retrieval import RetrievalRanks, rank_by_scores, reidentify
from raypp.utils.errors import ConfigError, DataError

NUM = 5
GALLERY = torch.arange(NUM, dtype=torch.uint8).view(NUM, 1, 1, 1)


def ranks_of(*scores: float) -> RetrievalRanks:
    """The rank of image 0 by scores of all images of the gallery."""
    labels = torch.zeros(NUM, dtype=torch.int64)
    return rank_by_scores([torch.tensor([scores])], torch.tensor([0]), GALLERY, labels)


@pytest.mark.parametrize("excluded", [math.nan, -math.inf])
def test_an_excluded_image_is_farther_than_the_original(excluded: float) -> None:
    ranks = ranks_of(2, excluded, 1, 3, 0)
    assert (ranks.all.item(), ranks.same_class.item()) == (1, 1)
    assert ranks_of(2, excluded, 1, excluded, 0).all.item() == 0
    assert ranks_of(-2, *[excluded] * 4).all.item() == 0
    assert ranks_of(math.inf, excluded, 1, 2, 3).all.item() == 0


@pytest.mark.parametrize("own", [math.nan, -math.inf])
def test_an_excluded_original_has_the_last_rank(own: float) -> None:
    assert ranks_of(own, 0, 1, 2, 3).all.item() == NUM - 1
    assert ranks_of(own, math.nan, -math.inf, 1, own).all.item() == NUM - 1
    assert ranks_of(*[own] * NUM).all.item() == NUM - 1


def test_infinite_scores_do_not_hide_the_order_of_finite_ones() -> None:
    assert ranks_of(2, math.inf, -math.inf, 1, 2 - 1e-15).all.item() == 2  # one is larger, one is a tie
    assert ranks_of(math.inf, math.inf, 0, 0, 0).all.item() == 1, "ties count against the original"


def test_an_empty_gallery_is_refused() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    with pytest.raises(ValueError, match="the gallery has 0 images; allowed is at least 1"):
        reidentify(GALLERY, GALLERY[:0], none, none)
    with pytest.raises(ValueError, match="the gallery has 0 images; allowed is at least 1"):
        rank_by_scores([torch.zeros(1, 0)], none, GALLERY[:0], none)


def test_reidentified_compares_arrays() -> None:
    gallery = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    gallery[5] = gallery[4]
    originals = gallery[:6]
    blurred = ((originals.astype(int) + 40) // 2).astype(np.uint8)
    for matcher in ("pixels", "cosine", "edges"):
        assert raypp.metrics.reidentified(originals, originals, gallery, matcher).all(), "a copy is no other image"
    assert raypp.metrics.reidentified(blurred, originals, gallery).tolist() == [True] * 6
    swapped = raypp.metrics.reidentified(originals[[1, 0, 2]], originals[:3], gallery)
    assert swapped.tolist() == [False, False, True]
    flat = np.full_like(originals, 128)
    assert not raypp.metrics.reidentified(flat, originals, gallery, "edges").any(), "ties are failures"
    twins = np.stack([np.full((8, 8, 3), value, np.uint8) for value in (100, 140)])
    assert not raypp.metrics.reidentified(np.full_like(twins, 120), twins, twins, "pixels").any()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"matcher": "ssim"}, "matcher is 'ssim'; allowed: pixels, cosine, edges"),
        ({"estimates": np.zeros((2, 8, 8, 3), np.uint8)}, r"estimates are \(2, 8, 8, 3\) and originals \(3, 8, 8, 3\)"),
        ({"gallery": np.zeros((9, 9, 8, 3), np.uint8)}, r"gallery images are \(9, 8, 3\), originals \(8, 8, 3\)"),
        ({"gallery": np.ones((9, 8, 8, 3), np.uint8)}, "gallery lacks 3 of 3 originals; allowed is one with all"),
        ({"estimates": np.zeros((3, 8, 8, 3))}, r"estimates is float64 \(3, 8, 8, 3\); allowed is uint8"),
    ],
)
def test_reidentified_refuses_other_arrays(change: dict[str, Any], sentence: str) -> None:
    zeros = np.zeros((3, 8, 8, 3), np.uint8)
    with pytest.raises((ConfigError, DataError), match=f"^{sentence}"):
        raypp.metrics.reidentified(**({"estimates": zeros, "originals": zeros, "gallery": zeros} | change))
