"""ResNet-20 for small images (He, Zhang, Ren, Sun 2016, section 4.2): parameter-free shortcuts (option A)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from raypp.models.layers import Normalize
from raypp.utils.registry import MethodConfig


class ResNetOptions(MethodConfig):
    name: Literal["resnet20"] = "resnet20"
    width: int = Field(16, ge=1, le=1024)
    """Channels of the first stage; the original has 16."""


class BasicBlock(nn.Module):
    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.stride = stride
        self.num_new_channels = channels_out - channels_in

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        if self.num_new_channels:
            half = self.num_new_channels // 2
            shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, self.num_new_channels - half))
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(x)) + shortcut, inplace=True)


class ResNetTrunk(nn.Module):
    """ResNet-20 before its last layer: images N x channels x H x W in [0, 1] to N x 4 width x H/4 x W/4.

    With ``num_classes`` it has that layer as well, for a subclass.
    """

    def __init__(self, options: ResNetOptions, channels: int = 3, num_classes: int | None = None) -> None:
        super().__init__()
        self.normalize = Normalize(channels)
        width = options.width
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = self._stage(width, width, stride=1)
        self.layer2 = self._stage(width, 2 * width, stride=2)
        self.layer3 = self._stage(2 * width, 4 * width, stride=2)
        self.channels_out = 4 * width
        if num_classes is not None:
            self.linear = nn.Linear(self.channels_out, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    @staticmethod
    def _stage(channels_in: int, channels_out: int, stride: int) -> nn.Sequential:
        first = BasicBlock(channels_in, channels_out, stride)
        return nn.Sequential(first, *(BasicBlock(channels_out, channels_out, 1) for _ in range(2)))

    def early_features(self, images: Tensor) -> Tensor:
        """Return the first stage's output, N x width x H x W: the feature network if VGG-16 is not available."""
        x: Tensor = self.layer1(F.relu(self.bn1(self.conv1(self.normalize(images))), inplace=True))
        return x

    def forward(self, images: Tensor) -> Tensor:
        x: Tensor = self.layer3(self.layer2(self.early_features(images)))
        return x


class ResNet20(ResNetTrunk):
    """Maps images N x channels x H x W in [0, 1] to logits N x num_classes.

    It has 269,722 parameters for 10 classes and width 16.
    """

    Options: ClassVar[type[MethodConfig]] = ResNetOptions
    least_side: ClassVar[int] = 4

    def __init__(self, options: ResNetOptions, *, num_classes: int, channels: int = 3) -> None:
        super().__init__(options, channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.linear(super().forward(images).mean(dim=(2, 3)))
        return logits
