"""Input normalization as a module, so that every image outside a network is in [0, 1]."""

from __future__ import annotations

import torch
from torch import Tensor, nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Normalize(nn.Module):
    """Normalizes images in [0, 1]: ImageNet's mean and std for RGB, 0.45 and 0.225 for gray.

    Other numbers of channels are an adaptation network's output, which is not changed.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        mean, std = {3: (IMAGENET_MEAN, IMAGENET_STD), 1: ((0.45,), (0.225,))}.get(channels, ((0.0,), (1.0,)))
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std
