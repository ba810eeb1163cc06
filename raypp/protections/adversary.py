"""Adversaries that train with a learned protection: a pool of inverse networks, and a contrastive matcher.

One backward pass trains both sides: each adversary lowers its loss, and its gradient to h_theta is reversed.

Source: adversarial training (Goodfellow et al. 2014) with reversed gradients (Ganin, Lempitsky 2015); InfoNCE (van den
Oord, Li, Vinyals 2018). The pool, the re-initialization in turn and the limit per image are ours.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from pydantic import BaseModel, Field
from torch import Tensor, nn

from raypp.models.layers import straight_through
from raypp.models.unet import UNet
from raypp.utils.images import quantize_8bit
from raypp.utils.registry import MethodConfig

ImageSize = tuple[int, int]
"""Height and width."""

NUM_POSITION_CHANNELS = 8  # of the wide U-Net's input
LINEAR_RANK = 128
EMBEDDING_SIZE, TEMPERATURE = 64, 0.1  # of the contrastive adversary
MAX_FEATURE_SIDE = 4  # of the contrastive adversary's last feature map


class AdversaryOptions(BaseModel):
    """Networks that train with h_theta to invert it, and that h_theta learns to defeat."""

    model_config = MethodConfig.model_config

    weight: float = Field(20.0, gt=0)
    """The loss of h_theta gains minus this weight times the squared error of the best estimate of each image."""
    clip: float = Field(1.0, gt=0)
    """Share of an image's baseline error above which h_theta gains nothing. The baseline is the mean training image."""
    pool: int = Field(3, ge=1, le=3)
    """Number of inverse networks: a U-Net, a U-Net of twice the width that knows positions, and a linear map. They
    multiply the time of a step; 1 is the cheapest."""
    refresh_steps: int = Field(250, ge=0)
    """Steps after which one inverse network of the pool is initialized again, in turn, so that h_theta does not adapt
    to one network; 0 never does."""
    width: int = Field(16, ge=1, le=1024)
    """Channels of the U-Net's first level."""
    depth: int = Field(3, ge=1, le=6)
    """Number of 2x2 poolings of the U-Nets."""
    contrastive: float = Field(0.0, ge=0)
    """Weight of a contrastive adversary, which matches protected to plain images of a batch by InfoNCE, such as 0.1;
    0 trains none."""


class InversePool(nn.Module):
    """Inverse networks that minimize their squared errors; h_theta maximizes the smallest error of each image.

    An image counts only while that error is below ``clip`` times its baseline error, the squared error of the running
    mean of training images. Beyond it, h_theta would gain by misleading these networks, which no attacker has to use.

    Args:
        size: height and width of training images.
    """

    mean_image: Tensor
    num_images: Tensor

    def __init__(self, options: AdversaryOptions, channels: int, size: ImageSize) -> None:
        super().__init__()
        self.options, self.channels, self.size = options, channels, size
        self.networks = nn.ModuleList(self._build(index) for index in range(options.pool))
        self.register_buffer("mean_image", torch.zeros(channels, *size))
        self.register_buffer("num_images", torch.zeros((), dtype=torch.int64))
        self.seed, self.steps = torch.initial_seed(), 0

    def _build(self, index: int) -> nn.Module:
        """Build a network of the pool, from protected images N x C x H x W to logits of plain ones."""
        width, depth = self.options.width, self.options.depth
        if index == 0:
            return UNet(self.channels, width, depth)
        if index == 1:
            return PositionalUNet(self.channels, self.size, 2 * width, depth)
        num_values = self.channels * self.size[0] * self.size[1]
        return nn.Sequential(
            nn.Flatten(), nn.BatchNorm1d(num_values), nn.Linear(num_values, LINEAR_RANK),
            nn.Linear(LINEAR_RANK, num_values), nn.Unflatten(1, (self.channels, *self.size)),
        )  # fmt: skip

    def forward(self, plain: Tensor, protected: Tensor) -> Tensor:
        """Return the sum of the networks' mean squared errors on a batch in [0, 1]."""
        uploaded = straight_through(protected, quantize_8bit(protected.detach()))
        inputs = [uploaded.clone() for _ in self.networks]
        estimates = [torch.sigmoid(network(x).float()) for network, x in zip(self.networks, inputs, strict=True)]
        errors = torch.stack([(estimate - plain).square().mean(dim=(1, 2, 3)) for estimate in estimates])
        self._update_mean(plain)
        limits = self.options.clip * (plain - self.mean_image).square().mean(dim=(1, 2, 3))
        smallest, best = errors.detach().min(dim=0)
        for index, x in enumerate(inputs):
            counts = (best == index) & (smallest < limits)
            _reverse_gradient(x, counts, self.options.weight)
        return errors.mean(dim=1).sum()

    @torch.no_grad()
    def _update_mean(self, plain: Tensor) -> None:
        self.num_images += len(plain)
        self.mean_image += (plain.mean(dim=0) - self.mean_image) * len(plain) / self.num_images

    def reinitialize(self) -> list[nn.Parameter]:
        """Count a step; every ``refresh_steps`` steps initialize the next network and return its parameters."""
        self.steps += 1
        period = self.options.refresh_steps
        if not period or self.steps % period:
            return []
        index = (self.steps // period - 1) % len(self.networks)
        network = self.networks[index]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed + self.steps)  # equal on all workers and after a resume
            network.load_state_dict(self._build(index).state_dict())
        return list(network.parameters())

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.steps)

    def set_extra_state(self, state: Tensor) -> None:
        self.steps = int(state)


class PositionalUNet(nn.Module):
    """U-Net with learned input channels that encode positions, for protections that depend on the position."""

    def __init__(self, channels: int, size: ImageSize, width: int, depth: int) -> None:
        super().__init__()
        self.positions = nn.Parameter(0.1 * torch.randn(1, NUM_POSITION_CHANNELS, *size))
        self.unet = UNet(channels + NUM_POSITION_CHANNELS, width, depth, channels_out=channels)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.unet(torch.cat((images, self.positions.expand(len(images), -1, -1, -1)), dim=1))
        return logits


class ContrastiveAdversary(nn.Module):
    """Matches protected to plain images of a batch; h_theta gains until the matcher is as good as chance.

    It minimizes InfoNCE L, the cross-entropy of the matching plain image among the batch. For a batch of N images,
    log N - L is a lower bound of the information in nats that a protected image carries about its plain image.
    """

    def __init__(self, weight: float, channels: int, size: ImageSize) -> None:
        super().__init__()
        self.weight = weight
        self.embed_protected, self.embed_plain = (embedding_network(channels, size) for _ in range(2))

    def forward(self, plain: Tensor, protected: Tensor) -> Tensor:
        """Return the mean InfoNCE of a batch in [0, 1]."""
        uploaded = straight_through(protected, quantize_8bit(protected.detach()))
        inputs = uploaded.clone()
        embedded = F.normalize(self.embed_protected(inputs).float(), dim=1)
        similarities = embedded @ F.normalize(self.embed_plain(plain).float(), dim=1).t() / TEMPERATURE
        loss = F.cross_entropy(similarities, torch.arange(len(plain), device=plain.device))
        _reverse_gradient(inputs, (loss.detach() < math.log(len(plain))).expand(len(plain)), self.weight)
        return loss


def embedding_network(channels: int, size: ImageSize) -> nn.Sequential:
    """Strided convolutions and a linear layer, from images N x channels x H x W to embeddings."""
    layers: list[nn.Module] = []
    height, width = size
    channels_in, channels_out = channels, 32
    while not layers or max(height, width) > MAX_FEATURE_SIDE:
        convolution = nn.Conv2d(channels_in, channels_out, 3, stride=2, padding=1)
        layers += [convolution, nn.BatchNorm2d(channels_out), nn.ReLU(inplace=True)]
        height, width = -(-height // 2), -(-width // 2)
        channels_in, channels_out = channels_out, 64
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels_in * height * width, EMBEDDING_SIZE))


def _reverse_gradient(inputs: Tensor, counts: Tensor, weight: float) -> None:
    """Scale the gradient of ``inputs`` by ``-weight`` for images that count (N,), and by 0 for others."""
    scale = torch.where(counts, -weight, 0.0)[:, None, None, None]
    inputs.register_hook(lambda gradient: gradient * scale)
