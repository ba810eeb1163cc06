"""Adaptation networks: they map protected images to inputs of a classifier for natural images.

Each takes images N x C x H x W in [0, 1] and returns N x ``channels_out`` x H x W.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raypp.models import ADAPTATIONS, BLOCK, CLASSIFIERS
from raypp.models.layers import Normalize
from raypp.utils.registry import MethodConfig


class Adaptation(nn.Module):
    """Base class; an instance accepts images of one number of channels and one size."""

    channels_out: ClassVar[int]
    side: ClassVar[int] = BLOCK
    """Side in pixels of the blocks that it reads."""
    layers: nn.Module

    def __init__(self, channels: int, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.normalize = Normalize(channels)

    def forward(self, images: Tensor) -> Tensor:
        x: Tensor = self.layers(self.normalize(images))
        return x

    def penalty(self) -> Tensor | None:
        """Return the regularization term of its source for the latest forward pass, or None."""
        return None


class BlockAdaptation(Adaptation):
    """One network for all 4 x 4 blocks.

    Source: Tanaka 2018, the layers of its public code: BN, conv 4x4/4 to 48, ReLU, BN, conv 1x1 to 48, ReLU, BN, conv
    1x1 to 512, pixel shuffle to 32 channels.
    """

    channels_out = 32

    def __init__(self, channels: int, image_size: tuple[int, int]) -> None:
        super().__init__(channels, image_size)
        self.layers = nn.Sequential(
            nn.BatchNorm2d(channels), nn.Conv2d(channels, 48, BLOCK, BLOCK), nn.ReLU(inplace=True),
            nn.BatchNorm2d(48), nn.Conv2d(48, 48, 1), nn.ReLU(inplace=True),
            nn.BatchNorm2d(48), nn.Conv2d(48, self.channels_out * BLOCK**2, 1), nn.PixelShuffle(BLOCK),
        )  # fmt: skip


class ShuffledBlockAdaptation(Adaptation):
    """A separate network for each block, then a learned permutation of the blocks.

    Source: Madono, Tanaka, Onishi, Ogawa 2020: spectrally normalized conv 4x4/4 to 256, BN, leaky ReLU 0.2 per block, a
    matrix U that mixes the blocks, pixel shuffle to 16 channels; the loss gains 1e-3 L12(U) + 1e-1 TV(features). We
    interpret L12 as the l1 - l2 penalty on rows and columns (Lyu, Zhang, Qi, Xin 2019), zero exactly for permutations,
    and divide both terms by their number of elements.
    """

    channels_out = 16
    width: ClassVar[int] = 256
    left: Tensor

    def __init__(self, channels: int, image_size: tuple[int, int]) -> None:
        super().__init__(channels, image_size)
        self.grid = tuple(-(-side // BLOCK) for side in image_size)
        num_blocks, num_inputs = self.grid[0] * self.grid[1], channels * BLOCK**2
        self.weight = nn.Parameter(torch.empty(num_blocks, num_inputs, self.width))
        nn.init.kaiming_uniform_(self.weight.view(num_blocks * num_inputs, self.width).t(), a=5**0.5)
        self.bias = nn.Parameter(torch.zeros(num_blocks, 1, self.width))
        self.bn = nn.BatchNorm1d(num_blocks * self.width)
        self.mix = nn.Parameter(torch.full((num_blocks, num_blocks), 1 / num_blocks) + 0.1 * torch.eye(num_blocks))
        self.register_buffer("left", F.normalize(torch.randn(num_blocks, num_inputs), dim=1))
        self._features: Tensor | None = None

    def forward(self, images: Tensor) -> Tensor:
        rows, columns = self.grid
        blocks = F.unfold(self.normalize(images), BLOCK, stride=BLOCK).permute(2, 0, 1)  # (num_blocks, N, C * 16)
        x = torch.baddbmm(self.bias, blocks, self._normalized_weight())  # (num_blocks, N, width)
        x = self.bn(x.permute(1, 0, 2).flatten(1)).view(-1, rows * columns, self.width)
        x = F.leaky_relu(x, 0.2)
        x = torch.einsum("ij,njw->niw", self._stochastic_mix(), x)
        x = F.pixel_shuffle(x.permute(0, 2, 1).reshape(-1, self.width, rows, columns), BLOCK)
        self._features = x if self.training else None
        return x

    def penalty(self) -> Tensor | None:
        features = self._features
        if features is None:
            return None
        mix = self._stochastic_mix()
        l12 = sum((mix.abs().sum(d) - mix.square().sum(d).add(1e-12).sqrt()).sum() for d in (0, 1))
        horizontal = (features[..., 1:] - features[..., :-1]).abs().float().mean()
        vertical = (features[..., 1:, :] - features[..., :-1, :]).abs().float().mean()
        return 1e-3 * l12 / len(mix) + 1e-1 * (horizontal + vertical)

    def _stochastic_mix(self) -> Tensor:
        """Return U with non-negative entries and rows that sum to one."""
        positive = self.mix.abs()
        return positive / positive.sum(1, keepdim=True)

    def _normalized_weight(self) -> Tensor:
        """Divide each block's weights by their largest singular value, tracked with one power iteration per step."""
        with torch.autocast(self.weight.device.type, enabled=False):
            with torch.no_grad():
                right = F.normalize(torch.einsum("bi,biw->bw", self.left, self.weight), dim=1)
                if self.training:
                    self.left.copy_(F.normalize(torch.einsum("biw,bw->bi", self.weight, right), dim=1))
            sigma = torch.einsum("bi,biw,bw->b", self.left.clone(), self.weight, right)
            return self.weight / sigma[:, None, None]


class PixelAdaptation(Adaptation):
    """1x1 convolutions, each with BN and ReLU: 64, 128, 256, 16.

    Source: Sirichotedumrong et al. 2019 use 1x1 kernels, according to a third party. Our widths follow the lab's attack
    network for pixel-based encryption.
    """

    channels_out = 16
    side = 1

    def __init__(self, channels: int, image_size: tuple[int, int]) -> None:
        super().__init__(channels, image_size)
        layers: list[nn.Module] = []
        for width in (64, 128, 256, self.channels_out):
            layers += [nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels = width
        self.layers = nn.Sequential(*layers)


class AdaptedClassifier(nn.Module):
    """A classifier with its adaptation network; takes images of one size, padded to the network's blocks."""

    def __init__(self, adaptation: Adaptation, classifier: nn.Module) -> None:
        super().__init__()
        self.adaptation = adaptation
        self.classifier = classifier

    def penalty(self) -> Tensor | None:
        return self.adaptation.penalty()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.adaptation(images))
        return logits


def build_classifier(
    options: MethodConfig, adaptation: str, *, num_classes: int, channels: int, image_size: tuple[int, int]
) -> nn.Module:
    """Build a classifier of protected images.

    Args:
        adaptation: name of the adaptation network in front of the classifier, or "none".
        image_size: height and width of the plain images.
    """
    if adaptation == "none":
        net: nn.Module = CLASSIFIERS.build(options, num_classes=num_classes, channels=channels)
        return net
    front: Adaptation = ADAPTATIONS.get(adaptation)(channels, image_size)
    return AdaptedClassifier(front, CLASSIFIERS.build(options, num_classes=num_classes, channels=front.channels_out))
