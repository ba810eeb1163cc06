"""GAN-based image transformation: an **approximation** of the paper's reference [19], whose details are not public.

Source: Sirichotedumrong, Kiya, "A GAN-based image transformation scheme for privacy-preserving deep neural networks",
EUSIPCO 2020 (arXiv 2006.01342). From its abstract: no key; a network turns plain images into protected ones, which a
classifier reads directly. From notes of others: perceptual, classification and per-pixel losses, a CycleGAN backbone.
Everything else is ours. The real images of the discriminator and the target of the pixel and perceptual losses are
images under pixel-based encryption with a key per image. All weights and widths are ours, too.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from raypp.models.layers import Residual
from raypp.protections.base import AuxiliaryNetworks, Protection
from raypp.protections.pixel import Pixel
from raypp.utils.keys import Key
from raypp.utils.registry import MethodConfig


class GAN(Protection):
    """CycleGAN's generator (Zhu, Park, Isola, Efros 2017): c7s1-64, d128, d256, residual blocks, u128, u64, c7s1-3.

    Sides are padded to multiples of 4 and cropped again.
    """

    class Options(MethodConfig):
        name: Literal["gan"] = "gan"
        width: int = Field(64, ge=1, le=512)
        """Channels of the generator's and the discriminator's first layer."""
        num_blocks: int = Field(6, ge=1, le=16)
        """Residual blocks of the generator."""
        adversarial: float = Field(0.1, ge=0)
        """Weight of the adversarial loss."""
        pixel: float = Field(1.0, ge=0)
        """Weight of the per-pixel squared error to the encrypted target."""
        perceptual: float = Field(0.001, ge=0)
        """Weight of the squared feature distance to the encrypted target."""

    differentiable = True
    trained = True
    least_side = 8

    def __init__(self, options: Options, *, channels: int = 3, key: Key | None = None) -> None:
        super().__init__(options, channels=channels, key=key)
        w = options.width
        up = nn.Upsample(scale_factor=2, mode="nearest")
        self.layers = nn.Sequential(
            nn.ReflectionPad2d(3), nn.Conv2d(channels, w, 7), nn.InstanceNorm2d(w), nn.ReLU(inplace=True),
            nn.Conv2d(w, 2 * w, 3, 2, 1), nn.InstanceNorm2d(2 * w), nn.ReLU(inplace=True),
            nn.Conv2d(2 * w, 4 * w, 3, 2, 1), nn.InstanceNorm2d(4 * w), nn.ReLU(inplace=True),
            *(
                Residual(
                    nn.ReflectionPad2d(1), nn.Conv2d(4 * w, 4 * w, 3), nn.InstanceNorm2d(4 * w), nn.ReLU(inplace=True),
                    nn.ReflectionPad2d(1), nn.Conv2d(4 * w, 4 * w, 3), nn.InstanceNorm2d(4 * w),
                )
                for _ in range(options.num_blocks)
            ),
            up, nn.Conv2d(4 * w, 2 * w, 3, 1, 1), nn.InstanceNorm2d(2 * w), nn.ReLU(inplace=True),
            up, nn.Conv2d(2 * w, w, 3, 1, 1), nn.InstanceNorm2d(w), nn.ReLU(inplace=True),
            nn.ReflectionPad2d(3), nn.Conv2d(w, channels, 7),
        )  # fmt: skip

    @classmethod
    def uses_features(cls, options: Any, alpha: float) -> bool:
        return bool(options.perceptual > 0)

    def build_auxiliary_networks(self, num_classes: int, image_size: tuple[int, int]) -> AuxiliaryNetworks:
        return Adversary(self.options, self.channels)

    def logits(self, images: Tensor) -> Tensor:
        """Return the output before the sigmoid, float32 N x C x H x W without bounds."""
        height, width = images.shape[-2:]
        padded = F.pad(images, (0, -width % 4, 0, -height % 4), mode="replicate")
        x: Tensor = self.layers(2 * padded - 1)[:, :, :height, :width]
        return 2 * x.float()  # CycleGAN ends with (tanh(x) + 1) / 2, which is sigmoid(2 x)

    def forward(self, images: Tensor) -> Tensor:
        # The sigmoid in float32: near 1, bfloat16 does not separate adjacent 8-bit values.
        return torch.sigmoid(self.logits(images))


class Adversary(AuxiliaryNetworks):
    """A patch discriminator between encrypted and generated images (hinge loss), and the generator's other losses."""

    uses_feature_loss = True

    def __init__(self, options: GAN.Options, channels: int) -> None:
        super().__init__()
        self.options = options
        self.target = Pixel(Pixel.Options(keys="per_image"), channels=channels)
        norm, w = nn.utils.parametrizations.spectral_norm, options.width
        self.discriminator = nn.Sequential(
            norm(nn.Conv2d(channels, w, 4, 2, 1)), nn.LeakyReLU(0.2),
            norm(nn.Conv2d(w, 2 * w, 4, 2, 1)), nn.LeakyReLU(0.2),
            norm(nn.Conv2d(2 * w, 1, 3, 1, 1)),
        )  # fmt: skip

    def forward(self, plain: Tensor, protected: Tensor, features: nn.Module | None, labels: Tensor) -> Tensor:
        """Return the sum of discriminator and generator loss; gradients of each reach its own weights only."""
        target = self.target(plain)
        real, fake = self.discriminator(target), self.discriminator(protected.detach())
        loss: Tensor = F.relu(1 - real).mean() + F.relu(1 + fake).mean()
        frozen_state = {name: value.detach() for name, value in self.discriminator.state_dict(keep_vars=True).items()}
        realness = torch.func.functional_call(self.discriminator, frozen_state, (protected,))
        loss = loss - self.options.adversarial * realness.mean()
        loss = loss + self.options.pixel * F.mse_loss(protected, target)
        if features is not None:
            with torch.no_grad():
                target_features = features(target)
            distance = F.mse_loss(features(protected).float(), target_features.float())
            loss = loss + self.options.perceptual * distance
        return loss
