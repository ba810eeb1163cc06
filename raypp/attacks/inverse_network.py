"""The inverse network, its inputs and loss, and the exponential moving average of weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from raypp.attacks.base import Shape, size_mismatch
from raypp.attacks.standardize import StandardizedLogits
from raypp.attacks.trained import TrainedOptions
from raypp.config.schema import LinearWarmupDecay, OptimizationConfig, Optimizer
from raypp.metrics.image import MIN_SIDE, ssim_for_loss
from raypp.models.unet import UNet
from raypp.training.task import StepOutput, TrainableModule
from raypp.utils.images import to_uint8

ProtectedBatches = Callable[[Tensor, Tensor], Tensor]
"""Maps plain images uint8 (n, C, H, W) and their indices (n,) to protected images float (n, C', H', W')."""


class ProtectedInputs(nn.Module):
    """Input planes of a network that reads protected images N x C' x H' x W' in [0, 1].

    The planes have the size of protected images, or of plain images where the two differ by more than padding.

    Args:
        shape: (C, H, W) of plain images.
        protected: (C', H', W') of protected ones.
        options: ``standardize`` and ``places``.
        num_classes: with more than 0, each image's class is an input.
    """

    protected: Tensor

    def __init__(self, shape: Shape, protected: Shape, options: Any, num_classes: int = 0) -> None:
        super().__init__()
        self.plain_size, self.num_classes = shape[1:], num_classes
        channels, *size = protected
        self.resized = size_mismatch(size, self.plain_size)
        height, width = self.plain_size if self.resized else size
        self.register_buffer("protected", torch.tensor(protected))  # the state dict alone suffices to build the network
        num_features = channels * 2 if options.standardize else channels
        self.standardize = StandardizedLogits(channels, (height, width)) if options.standardize else None
        self.places = nn.Parameter(torch.randn(1, options.places, height, width) * 0.1) if options.places else None
        self.num_planes = num_features + options.places + num_classes

    @torch.no_grad()
    def fit_normalization(self, protected: Tensor) -> None:
        """Set mean and standard deviation of every position from protected images uint8 (N, C', H', W')."""
        if self.standardize is not None:
            self.standardize.fit(self._resize(protected.float() / 255))

    def _resize(self, protected: Tensor) -> Tensor:
        if self.resized:
            return F.interpolate(protected, size=self.plain_size, mode="bilinear", antialias=True)
        return protected

    def forward(self, protected: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return planes N x ``num_planes`` x H x W; ``labels`` (N,) are needed with classes."""
        x = self._resize(protected)
        if self.standardize is not None:
            x = self.standardize(x)
        planes = [x]
        if self.places is not None:
            planes.append(self.places.expand(len(x), -1, -1, -1))
        if self.num_classes:
            assert labels is not None
            one_hot = F.one_hot(labels, self.num_classes).to(x.dtype)[:, :, None, None]
            planes.append(one_hot.expand(-1, -1, *x.shape[2:]))
        return torch.cat(planes, dim=1)


class InverseNetwork(nn.Module):
    """U-Net from protected images N x C' x H' x W' to estimates of plain ones N x C x H x W, all in [0, 1].

    Estimates lose the padding of protected images; protected images of another size are resized. The options add
    inputs to the U-Net, see :class:`InverseBaseConfig`.

    Args:
        shape: (C, H, W) of plain images.
        protected: (C', H', W') of protected ones.
        options: ``width``, ``depth``, ``standardize``, ``places``, ``patch`` and ``smooth``.
        num_classes: with more than 0, each image's class is an input.
    """

    def __init__(self, shape: Shape, protected: Shape, options: InverseBaseConfig, num_classes: int = 0) -> None:
        super().__init__()
        self.size, self.patch = shape[1:], options.patch
        self.inputs = ProtectedInputs(shape, protected, options, num_classes)
        num_inputs, num_outputs = self.inputs.num_planes * self.patch**2, shape[0] * self.patch**2
        self.unet = UNet(num_inputs, options.width, options.depth, channels_out=num_outputs, smooth=options.smooth)

    def forward(self, protected: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self.inputs(protected, labels)
        pad = (0, -x.shape[3] % self.patch, 0, -x.shape[2] % self.patch)
        x = F.pixel_unshuffle(F.pad(x, pad, mode="replicate") if any(pad) else x, self.patch)
        estimate = torch.sigmoid(F.pixel_shuffle(self.unet(x).float(), self.patch))
        height, width = self.size
        return estimate[:, :, :height, :width]


class AveragedModule(TrainableModule):
    """A network that learns from pairs and, with option ``ema``, the moving average of its weights, which attacks."""

    def __init__(self, net: nn.Module, source: ProtectedBatches, options: Any) -> None:
        super().__init__()
        self.net, self.source, self.options = net, source, options
        self.average = None
        if options.ema:
            update = partial(_update_average, decay=options.ema)
            self.average = AveragedModel(net, multi_avg_fn=update).requires_grad_(False)

    @property
    def final(self) -> nn.Module:
        """The network that attacks."""
        return self.net if self.average is None else self.average.module

    def protect(self, images: Tensor, indices: Tensor) -> Tensor:
        """Protect plain images float N x C x H x W, rounded to 8 bits."""
        with torch.autocast(images.device.type, enabled=False):
            return self.source(to_uint8(images), indices)

    def on_after_optimizer_step(self) -> None:
        if self.average is not None:
            self.average.update_parameters(self.net)


def _update_average(averages: list[Tensor], weights: list[Tensor], num_averaged: Tensor, *, decay: float) -> None:
    """Move averages towards weights: by ``1 - decay``, and by more in the first steps."""
    step = int(num_averaged) + 1
    torch._foreach_lerp_(averages, weights, 1 - min(decay, (1 + step) / (10 + step)))


class InverseModule(AveragedModule):
    """An inverse network in training; ``labels`` (N,) of all training images are inputs where they are not None."""

    def __init__(self, net: InverseNetwork, source: ProtectedBatches, labels: Tensor | None, options: Any) -> None:
        super().__init__(net, source, options)
        self.labels = labels

    def forward(self, images: Tensor, indices: Tensor) -> StepOutput:
        protected = self.protect(images, indices)
        if self.options.flip_pairs:  # plain and protected images together, as in the released code
            flipped = (torch.rand(len(images)) < 0.5).to(images.device)[:, None, None, None]
            images = torch.where(flipped, images.flip(3), images)
            protected = torch.where(flipped, protected.flip(3), protected)
        labels = self.labels[indices] if self.labels is not None else None
        return reconstruction_loss(self.net(protected, labels), images, self.options)


def reconstruction_loss(estimates: Tensor, images: Tensor, options: Any) -> StepOutput:
    """Loss and metrics of estimates N x C x H x W in [0, 1], with the options ``loss`` and ``ssim_weight``."""
    error = F.mse_loss(estimates, images)
    metrics = {"psnr": -10 * torch.log10(error.detach().clamp_min(1e-9))}
    loss = error if options.loss == "mse" else F.l1_loss(estimates, images)
    if options.ssim_weight and min(images.shape[-2:]) >= MIN_SIDE:
        similarity = ssim_for_loss(estimates, images).mean()
        loss = loss + options.ssim_weight * (1 - similarity)
        metrics["ssim"] = similarity.detach()
    return StepOutput(loss, metrics)


class InverseBaseConfig(TrainedOptions):
    """Options of inverse networks; the defaults are those of ``inverse``."""

    width: int = Field(64, ge=1, le=1024)
    """Channels of the U-Net's first level."""
    depth: int = Field(3, ge=1, le=6)
    """Number of 2x2 poolings of the U-Net."""
    patch: int = Field(1, ge=1, le=16)
    """Side of the pixel patches that become channels of the U-Net's input; 2 takes a fourth of the time, for a weaker
    attack."""
    standardize: bool = True
    """Standardize each protected value and its logit by mean and standard deviation at their position. This amplifies
    the small differences between protected images that look alike."""
    places: int = Field(8, ge=0, le=256)
    """Learned input channels that encode positions, for protections that depend on the position."""
    smooth: bool = True
    """GELU instead of ReLU."""
    loss: Literal["l1", "mse"] = "l1"
    """Absolute or squared error."""
    ssim_weight: float = Field(0.1, ge=0)
    """Weight of 1 - SSIM in the loss. A large weight learns structure first and brightness last."""
    fixed_pairs: bool = False
    """Protect the attacker's images once, instead of in every epoch after random crops and flips."""
    crop_padding: int = Field(2, ge=0)
    """Pixels of padding for random crops before protecting."""
    flip: bool = True
    """Flip half of the images before protecting."""
    flip_pairs: bool = False
    """Flip plain and protected image together, after protecting."""
    ema: float = Field(0.998, ge=0, lt=1)
    """Decay of the moving average of weights that attacks in the end; 0 for no average."""
    train: OptimizationConfig = OptimizationConfig(
        epochs=20,
        batch_size=32,
        optimizer=Optimizer(name="muon", lr=0.004, momentum=0.95, weight_decay=0.0),
        schedule=LinearWarmupDecay(warmup=0.2, final=0.0),
    )
