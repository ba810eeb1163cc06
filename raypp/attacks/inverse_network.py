"""The inverse network, its loss, and its exponential moving average."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from raypp.attacks.base import TrainedOptions, size_mismatch
from raypp.config.schema import LinearWarmupDecay, OptimizationConfig, Optimizer
from raypp.metrics.image import MIN_SIDE, ssim_for_loss
from raypp.models.perceptual import StateDict
from raypp.models.unet import UNet
from raypp.training.task import StepOutput, TrainableModule
from raypp.utils.images import to_uint8

LOGIT_EPS = 0.5 / 255  # how near to 0 and 1 a value of 8 bits may lie: their logits are infinite
MIN_STD = (0.02, 0.2)  # of a value and of its logit: a place that hardly ever changes is not blown up to unit scale
STEPS = "steps"  # how many the average has seen, among a checkpoint's tensors
MAX_ZSCORE = 8.0  # standard deviations that a standardised value may be away from its mean

ProtectedBatches = Callable[[Tensor, Tensor], Tensor]
"""Protected images float (n, C', H', W') of plain ones uint8 (n, C, H, W) and of their places (n,) in the set."""


class InverseNetwork(nn.Module):
    """U-Net from protected images N x C' x H' x W' to estimates of plain ones N x C x H x W, all in [0, 1].

    Protected images that are larger by padding are cut, those of quite another size resized. What the U-Net sees
    besides their values is up to the options: see :class:`BaseOptions`.

    Args:
        shape: (C, H, W) of plain images.
        protected: (C', H', W') of protected ones.
        options: ``width``, ``depth``, ``standardise``, ``places``, ``patch`` and ``smooth``.
        num_classes: with more than none, the network is told each image's class.
    """

    mean: Tensor
    std: Tensor
    protected: Tensor

    def __init__(
        self,
        shape: tuple[int, int, int],
        protected: tuple[int, int, int],
        options: InverseBaseConfig,
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        self.size, self.num_classes, self.patch = shape[1:], num_classes, options.patch
        channels, *size = protected
        self.resized = size_mismatch(size, self.size)
        size = list(self.size) if self.resized else size
        self.register_buffer("protected", torch.tensor(protected))  # so that its weights alone say how it is built
        seen = channels * 2 if options.standardise else channels
        self.standardise = options.standardise
        if self.standardise:
            self.register_buffer("mean", torch.zeros(1, seen, *size))
            self.register_buffer("std", torch.ones(1, seen, *size))
        self.places = nn.Parameter(torch.randn(1, options.places, *size) * 0.1) if options.places else None
        inputs = (seen + options.places + num_classes) * self.patch**2
        outputs = shape[0] * self.patch**2
        self.unet = UNet(inputs, options.width, options.depth, channels_out=outputs, smooth=options.smooth)

    @torch.no_grad()
    def fit_normalization(self, protected: Tensor) -> None:
        """Take mean and spread of every place from protected images uint8 (N, C', H', W')."""
        if self.standardise:
            seen = self._seen(self._fitted(protected.float() / 255))
            least = seen.new_tensor(MIN_STD).repeat_interleave(seen.shape[1] // 2)[None, :, None, None]
            self.mean.copy_(seen.mean(0, keepdim=True))
            self.std.copy_(seen.std(0, correction=0, keepdim=True).maximum(least))

    def _fitted(self, protected: Tensor) -> Tensor:
        if self.resized:
            return F.interpolate(protected, size=self.size, mode="bilinear", antialias=True)
        return protected

    @staticmethod
    def _seen(values: Tensor) -> Tensor:
        """Values in [0, 1] and their logits: a sigmoid's output near 0 or 1 says most by its last bits."""
        return torch.cat((values, torch.logit(values.clamp(LOGIT_EPS, 1 - LOGIT_EPS))), dim=1)

    def forward(self, protected: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self._fitted(protected)
        if self.standardise:
            x = ((self._seen(x) - self.mean) / self.std).clamp(-MAX_ZSCORE, MAX_ZSCORE)
        parts = [x]
        if self.places is not None:
            parts.append(self.places.expand(len(x), -1, -1, -1))
        if self.num_classes:
            assert labels is not None
            planes = F.one_hot(labels, self.num_classes).to(x.dtype)[:, :, None, None]
            parts.append(planes.expand(-1, -1, *x.shape[2:]))
        x = torch.cat(parts, dim=1)
        pad = (0, -x.shape[3] % self.patch, 0, -x.shape[2] % self.patch)
        x = F.pixel_unshuffle(F.pad(x, pad, mode="replicate") if any(pad) else x, self.patch)
        estimate = torch.sigmoid(F.pixel_shuffle(self.unet(x).float(), self.patch))
        height, width = self.size
        return estimate[:, :, :height, :width]


class InverseModule(TrainableModule):
    """An inverse network and, where wanted, the running average of its weights that is used in the end."""

    def __init__(self, net: InverseNetwork, source: ProtectedBatches, labels: Tensor | None, options: Any) -> None:
        super().__init__()
        self.net, self.source, self.labels, self.options = net, source, labels, options
        self.average = copy.deepcopy(net).requires_grad_(False) if options.ema else None
        self.steps = 0

    @property
    def final(self) -> InverseNetwork:
        """The network that attacks."""
        return self.net if self.average is None else self.average

    def trainable_state_dict(self) -> StateDict:
        return super().trainable_state_dict() | {STEPS: torch.tensor(self.steps)}

    def load_trainable_state_dict(self, state: StateDict) -> None:
        super().load_trainable_state_dict({key: tensor for key, tensor in state.items() if key != STEPS})
        self.steps = int(state[STEPS])

    def forward(self, images: Tensor, at: Tensor) -> StepOutput:
        with torch.autocast(images.device.type, enabled=False):
            protected = self.source(to_uint8(images), at)
        if self.options.flip_pairs:  # plain and protected alike, as the released code does
            flipped = (torch.rand(len(images)) < 0.5).to(images.device)[:, None, None, None]
            images = torch.where(flipped, images.flip(3), images)
            protected = torch.where(flipped, protected.flip(3), protected)
        labels = self.labels[at] if self.labels is not None else None
        return reconstruction_loss(self.net(protected, labels), images, self.options)

    def on_after_optimizer_step(self) -> None:
        if self.average is None:
            return
        self.steps += 1
        # At the start, when hardly anything has been averaged, the share of what is new is larger.
        share = 1 - min(self.options.ema, (1 + self.steps) / (10 + self.steps))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.net.parameters()), share)
            for kept, new in zip(self.average.buffers(), self.net.buffers(), strict=True):
                kept.copy_(new)


def reconstruction_loss(estimates: Tensor, images: Tensor, options: Any) -> StepOutput:
    """What attacks that draw minimise, by options ``loss`` and ``ssim_weight``; images N x C x H x W in [0, 1]."""
    error = F.mse_loss(estimates, images)
    metrics = {"psnr": -10 * torch.log10(error.detach().clamp_min(1e-9))}
    loss = error if options.loss == "mse" else F.l1_loss(estimates, images)
    if options.ssim_weight and min(images.shape[-2:]) >= MIN_SIDE:
        similarity = ssim_for_loss(estimates, images).mean()
        loss = loss + options.ssim_weight * (1 - similarity)
        metrics["ssim"] = similarity.detach()
    return StepOutput(loss, metrics)


class InverseBaseConfig(TrainedOptions):
    """What inverse networks have in common; the defaults are the strong one's."""

    width: int = Field(64, ge=1, le=1024)
    """Channels of the U-Net's first level."""
    depth: int = Field(3, ge=1, le=6)
    """Number of 2x2 poolings of the U-Net."""
    patch: int = Field(1, ge=1, le=16)
    """The U-Net works on patches of so many pixels a side, each a pixel with as many more channels: a fourth of the
    time with 2, for a weaker attack."""
    standardise: bool = True
    """Show the U-Net each protected value and its logit, both with the mean and the spread that they have at their
    place taken off: a protection that draws much the same picture for all images says what differs in small changes."""
    places: int = Field(8, ge=0, le=256)
    """Learned channels that tell the U-Net where it is: a protection need not treat all places alike."""
    smooth: bool = True
    """GELU instead of ReLU."""
    loss: Literal["l1", "mse"] = "l1"
    """Absolute or squared error."""
    ssim_weight: float = Field(0.1, ge=0)
    """What is added: so many times 1 - SSIM. A large weight learns structure first and brightness last."""
    fixed_pairs: bool = False
    """Protect the attacker's images once and for all instead of afresh, cropped and mirrored, in every epoch."""
    crop_padding: int = Field(2, ge=0)
    """Random crops before protecting, after so many pixels of padding."""
    flip: bool = True
    """Mirror half of the images before they are protected."""
    flip_pairs: bool = False
    """Mirror plain and protected image alike, after protecting."""
    ema: float = Field(0.998, ge=0, lt=1)
    """Decay of the running average of weights that attacks in the end; 0 takes the weights themselves."""
    conditional: bool = False
    """Tell the network the class, which the cloud knows: at the attack, the classifier's answer."""
    train: OptimizationConfig = OptimizationConfig(
        epochs=20,
        batch_size=32,
        optimizer=Optimizer(name="muon", lr=0.004, momentum=0.95, weight_decay=0.0),
        schedule=LinearWarmupDecay(warmup=0.2, final=0.0),
    )
