"""Layers and functions that several networks share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
BATCH_SIZE = 500  # images of a forward pass without gradients


class Normalize(nn.Module):
    """Normalizes images in [0, 1]: ImageNet's mean and std for RGB, 0.45 and 0.225 for gray.

    Every image outside a network is therefore in [0, 1]. Other numbers of channels are an adaptation network's output,
    which is not changed.
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


class Residual(nn.Module):
    """Adds its input to the output of its layers."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.layers(x)
        return y


def straight_through(values: Tensor, replacement: Tensor) -> Tensor:
    """Return ``replacement``, whose gradient passes unchanged to ``values`` of the same shape.

    Source: straight-through estimator (Bengio, Leonard, Courville 2013).
    """
    return values + (replacement - values).detach()


@torch.inference_mode()
def logits_in_batches(classifier: nn.Module, images: Tensor) -> Tensor:
    """Logits float (N, K) of images uint8 (N, C, H, W) on the classifier's device."""
    return torch.cat([classifier(batch.float() / 255) for batch in images.split(BATCH_SIZE)])
