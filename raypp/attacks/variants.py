"""Variants of an image that show the same: a crop, its mirror image and a JPEG re-encoding."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from raypp.models.jpeg import jpeg

CROP_SIDE = 7 / 8  # of the image's sides
JPEG_QUALITY = 75


def _crop(images: Tensor) -> Tensor:
    """Crop each image to ``CROP_SIDE`` at a random place, and resize it bilinearly."""
    scale = images.new_tensor([[CROP_SIDE, 0.0], [0.0, CROP_SIDE]]).expand(len(images), 2, 2)
    offsets = ((2 * torch.rand(len(images), 2, 1) - 1) * (1 - CROP_SIDE)).to(images)
    grid = F.affine_grid(torch.cat((scale, offsets), dim=2), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _flip(images: Tensor) -> Tensor:
    return images.flip(3)


def _jpeg(images: Tensor) -> Tensor:
    return jpeg(images, JPEG_QUALITY)


VARIANTS: dict[str, Callable[[Tensor], Tensor]] = {"crop": _crop, "flip": _flip, "jpeg": _jpeg}
"""Functions from and to images (N, C, H, W) in [0, 1]; random ones use torch's generator of the CPU."""


@torch.no_grad()
def random_variants(images: Tensor) -> Tensor:
    """Replace half of the images (N, C, H, W) in [0, 1] by a variant of a random kind."""
    kinds = torch.randint(2 * len(VARIANTS), (len(images),)).to(images.device)
    result = images.clone()
    for kind, variant in enumerate(VARIANTS.values()):
        chosen = (kinds == kind).nonzero().flatten()
        if len(chosen):
            result[chosen] = variant(images[chosen]).to(images.dtype)
    return result
