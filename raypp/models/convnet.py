"""A small convolutional network, down to a linear classifier of a thumbnail."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from raypp.models.layers import Normalize
from raypp.utils.registry import MethodConfig

LAYERS_PER_LEVEL = 3


class ConvNetOptions(MethodConfig):
    name: Literal["convnet"] = "convnet"
    width: int = Field(32, ge=1, le=1024)
    """Channels of the first convolution; each further one doubles them."""
    depth: int = Field(2, ge=0, le=6)
    """Number of 3x3 convolutions of stride 2, each with batch normalization and ReLU. 0 leaves a linear classifier."""
    grid: int = Field(4, ge=1, le=64)
    """Side of the grid to which features are averaged before the linear layer."""


class ConvNet(nn.Module):
    """Maps images N x channels x H x W in [0, 1] to logits N x num_classes."""

    Options: ClassVar[type[MethodConfig]] = ConvNetOptions
    least_side: ClassVar[int] = 1

    def __init__(self, options: ConvNetOptions, *, num_classes: int, channels: int = 3) -> None:
        super().__init__()
        self.normalize = Normalize(channels)
        layers: list[nn.Module] = []
        for level in range(options.depth):
            width = options.width * 2**level
            layers += [nn.Conv2d(channels, width, 3, 2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        self.layers = nn.Sequential(*layers)
        self.grid = options.grid
        self.linear = nn.Linear(channels * options.grid**2, num_classes)

    def early_features(self, images: Tensor) -> Tensor:
        """Return the first convolution's features, or normalized images without any convolution."""
        x: Tensor = self.layers[:LAYERS_PER_LEVEL](self.normalize(images))
        return x

    def forward(self, images: Tensor) -> Tensor:
        features = F.adaptive_avg_pool2d(self.layers[LAYERS_PER_LEVEL:](self.early_features(images)), self.grid)
        logits: Tensor = self.linear(features.flatten(1))
        return logits
