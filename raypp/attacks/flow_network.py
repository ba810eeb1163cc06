"""The network of the attack ``flow_matching``: a U-Net that predicts a velocity from noisy and protected images."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raypp.attacks.base import Shape
from raypp.attacks.inverse_network import ProtectedInputs

TIME_FEATURES = 64  # sines and cosines of the time
MAX_FREQUENCY = 1000.0


class TimeEmbedding(nn.Module):
    """Maps times (N,) in [0, 1] to N x channels (Vaswani et al. 2017, as in Ho, Jain, Abbeel 2020)."""

    frequencies: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        frequencies = torch.exp(torch.linspace(0, math.log(MAX_FREQUENCY), TIME_FEATURES // 2))
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.layers = nn.Sequential(nn.Linear(TIME_FEATURES, channels), nn.SiLU(), nn.Linear(channels, channels))

    def forward(self, times: Tensor) -> Tensor:
        angles = times[:, None] * self.frequencies
        embedding: Tensor = self.layers(torch.cat((angles.sin(), angles.cos()), dim=1))
        return embedding


class TimeBlock(nn.Module):
    """Residual block of two 3x3 convolutions; the time scales and shifts its features."""

    def __init__(self, channels_in: int, channels_out: int, time_channels: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(math.gcd(8, channels_in), channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.time = nn.Linear(time_channels, 2 * channels_out)
        self.norm2 = nn.GroupNorm(math.gcd(8, channels_out), channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.shortcut = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.time(embedding)[:, :, None, None].chunk(2, dim=1)
        y = self.conv2(F.silu(self.norm2(y) * (1 + scale) + shift))
        output: Tensor = self.shortcut(x) + y
        return output


class FlowNetwork(nn.Module):
    """U-Net from noisy images, times and the planes of protected images to velocities.

    Args:
        shape: (C, H, W) of plain images.
        protected: (C', H', W') of protected ones.
        options: ``width``, ``depth``, ``standardize`` and ``places``.
    """

    def __init__(self, shape: Shape, protected: Shape, options: Any) -> None:
        super().__init__()
        self.depth = options.depth
        self.inputs = ProtectedInputs(shape, protected, options)
        widths = [options.width * 2**level for level in range(options.depth + 1)]
        time_channels = 4 * options.width
        self.embed = TimeEmbedding(time_channels)
        self.stem = nn.Conv2d(self.inputs.num_planes + shape[0], options.width, 3, padding=1)
        pairs = itertools.pairwise([options.width, *widths])
        self.down = nn.ModuleList(TimeBlock(before, after, time_channels) for before, after in pairs)
        self.up = nn.ModuleList(
            TimeBlock(widths[level] + widths[level + 1], widths[level], time_channels) for level in range(options.depth)
        )
        self.norm = nn.GroupNorm(math.gcd(8, options.width), options.width)
        self.head = nn.Conv2d(options.width, shape[0], 3, padding=1)
        nn.init.zeros_(self.head.weight)

    def forward(self, noisy: Tensor, times: Tensor, planes: Tensor) -> Tensor:
        """Return velocities N x C x H x W.

        Args:
            noisy: N x C x H x W; plain images have values in [-1, 1].
            times: (N,), from 0 for noise to 1 for plain images.
            planes: ``inputs`` of the protected images, N x P x H' x W' with H' >= H.
        """
        height, width = noisy.shape[2:]
        multiple = 2**self.depth
        sides = [-(-side // multiple) * multiple for side in planes.shape[2:]]
        x = self.stem(torch.cat((_pad(noisy, sides), _pad(planes, sides)), dim=1))
        embedding = self.embed(times)
        skips = []
        for level, block in enumerate(self.down):
            x = block(F.avg_pool2d(x, 2) if level else x, embedding)
            skips.append(x)
        x = skips.pop()
        for level in reversed(range(self.depth)):
            x = F.interpolate(x, scale_factor=2, mode="nearest")
            x = self.up[level](torch.cat((skips[level], x), dim=1), embedding)
        velocity: Tensor = self.head(F.silu(self.norm(x))).float()
        return velocity[:, :, :height, :width]


def _pad(images: Tensor, sides: list[int]) -> Tensor:
    """Repeat the last row and column up to these sides."""
    padding = (0, sides[1] - images.shape[3], 0, sides[0] - images.shape[2])
    return F.pad(images, padding, mode="replicate") if any(padding) else images
