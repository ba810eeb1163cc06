"""VGG-16 (Simonyan, Zisserman 2015): the batch-normalized classifier for small images, and the slice up to relu2_2."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor, nn

from raypp.models.layers import Normalize
from raypp.utils.registry import MethodConfig

# Channels of the 3x3 convolutions of VGG-16 ("configuration D"); 0 stands for a 2x2 max-pooling.
VGG16_LAYERS = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)
RELU2_2 = 5
SLICES = {"relu1_2": 2, "relu2_2": RELU2_2, "relu3_3": 9}
"""Number of entries of ``VGG16_LAYERS`` up to each layer."""


def vgg_features(layers: tuple[int, ...], channels: int, batch_norm: bool) -> nn.Sequential:
    """Build the convolutional part; module indices equal those of ``torchvision.models.vgg16().features``."""
    modules: list[nn.Module] = []
    for width in layers:
        if width == 0:
            modules.append(nn.MaxPool2d(2))
            continue
        modules.append(nn.Conv2d(channels, width, 3, padding=1))
        if batch_norm:
            modules.append(nn.BatchNorm2d(width))
        modules.append(nn.ReLU(inplace=True))
        channels = width
    return nn.Sequential(*modules)


class VGG16BN(nn.Module):
    """Maps images N x channels x H x W in [0, 1], sides of at least 32, to logits N x num_classes; head 512-512."""

    class Options(MethodConfig):
        name: Literal["vgg16_bn"] = "vgg16_bn"

    least_side: ClassVar[int] = 32

    def __init__(self, options: Options, *, num_classes: int, channels: int = 3) -> None:
        super().__init__()
        self.normalize = Normalize(channels)
        self.early = vgg_features(VGG16_LAYERS[:RELU2_2], channels, batch_norm=True)
        self.late = vgg_features(VGG16_LAYERS[RELU2_2:], 128, batch_norm=True)
        self.head = nn.Sequential(
            nn.Linear(512, 512), nn.ReLU(inplace=True), nn.Dropout(),
            nn.Linear(512, 512), nn.ReLU(inplace=True), nn.Dropout(),
            nn.Linear(512, num_classes),
        )  # fmt: skip
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def early_features(self, images: Tensor) -> Tensor:
        """Return relu2_2 of this network, N x 128 x H/2 x W/2."""
        x: Tensor = self.early(self.normalize(images))
        return x

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.late(self.early_features(images)).mean(dim=(2, 3)))
        return logits
