"""The learned protection h_theta: a U-Net whose sigmoid output is the protected image.

Source: Ito, Kinoshita, Kiya 2020 (arXiv 2008.03143), section II; output range as in the authors' released code. The
adversary is ours, after adversarial training against a live attacker (Goodfellow et al. 2014) with reversed gradients
(Ganin, Lempitsky 2015), and so is the code, after finite scalar quantisation (Mentzer et al. 2023).
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from raypp.models.jpeg import jpeg
from raypp.models.resnet import ResNetOptions, ResNetTrunk
from raypp.models.unet import UNet
from raypp.protections.base import Protection
from raypp.utils import registry
from raypp.utils.images import quantize_8bit
from raypp.utils.keys import Key


class AdversaryOptions(BaseModel):
    """An inverse network that trains along and that h_theta learns to defeat."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    weight: float = Field(20.0, gt=0)
    """What the loss gains: minus so many times the squared error of its estimate of each image."""
    clip: float = Field(0.06, gt=0)
    """Squared error per image beyond which h_theta gains nothing: about what an attacker has who saw nothing."""
    width: int = Field(16, ge=1, le=1024)
    """Channels of its U-Net's first level."""
    depth: int = Field(3, ge=1, le=6)
    """Number of 2x2 poolings of its U-Net."""


class CodeOptions(BaseModel):
    """A few whole numbers that an image is reduced to, and that its protected image is drawn from alone."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    size: int = Field(10, ge=0, le=4096)
    """How many numbers; 0 only beside ``classes``."""
    levels: int = Field(2, ge=2, le=256)
    """How many values each of them takes: an image's protected one tells ``size * log2(levels)`` bits at most, and
    ``log2(classes)`` more."""
    classes: int | None = Field(None, ge=2)
    """Send the class before the numbers, as the encoder sees it: how many classes the data has, or null for none."""
    encoder: ResNetOptions | None = None
    """What makes the features that the numbers are made from: a ResNet-20 without its last layer, or, null, the
    U-Net's own way down. ``width`` and ``depth`` are then the decoder's only."""
    guide: float = Field(1.0, ge=0)
    """Weight of the cross-entropies of two linear classifiers, of the pooled features and of the code, which teach the
    encoder and the code sooner than the classifier of protected images does; 0 leaves them out. With ``classes`` the
    first of them is what decides on the class, and nothing else teaches the encoder."""

    @model_validator(mode="after")
    def _something_to_send(self) -> CodeOptions:
        if self.classes is None and self.size == 0:
            raise ValueError("size is 0, allowed without classes is at least 1: nothing would be sent")
        if self.classes is not None and self.guide == 0:
            raise ValueError("guide is 0, allowed beside classes is more: nothing else teaches the encoder the class")
        return self


class LearnedOptions(registry.MethodConfig):
    name: Literal["learned"] = "learned"
    width: int = Field(64, ge=1, le=1024)
    """Channels of the U-Net's first level."""
    depth: int = Field(4, ge=1, le=6)
    """Number of 2x2 poolings of the U-Net."""
    skips: int | None = Field(None, ge=0)
    """Skip connections kept, counted from the deepest level; null keeps all."""

    code: CodeOptions | None = None
    """Send no more of an image than a short code; needs skips 0. Null limits nothing."""
    jpeg: int | None = Field(None, ge=1, le=100)
    """Train the classifier on JPEGs too, of this quality and better: for uploads that are re-encoded on their way."""
    adversary: AdversaryOptions | None = None
    """Train against a live inverse network as well; null trains as the paper does."""

    @model_validator(mode="after")
    def _skips_within_depth(self) -> LearnedOptions:
        if self.skips is not None and self.skips > self.depth:
            raise ValueError(f"skips is {self.skips}, allowed is at most depth = {self.depth}")
        if self.code is not None and self.skips != 0:
            raise ValueError(f"skips is {self.skips}, allowed beside a code is 0: a skip connection would pass it by")
        if self.code is not None and self.code.classes is not None and self.adversary is not None:
            raise ValueError(
                f"code.classes is {self.code.classes}, allowed beside an adversary is null: nothing that an adversary "
                "says reaches what decides on the class"
            )
        return self


class Learned(Protection):
    """U-Net with a sigmoid; any H and W, best in multiples of ``2**depth``."""

    Options: ClassVar[type[registry.MethodConfig]] = LearnedOptions
    differentiable: ClassVar[bool] = True
    trained: ClassVar[bool] = True

    def __init__(self, options: LearnedOptions, *, channels: int = 3, key: Key | None = None) -> None:
        super().__init__()
        deepest = options.width * 2**options.depth
        trunk, code = None, None
        if options.code is not None:
            trunk = ResNetTrunk(options.code.encoder, channels) if options.code.encoder is not None else None
            code = Bottleneck(options.code, trunk.channels_out if trunk is not None else deepest, deepest)
        self.unet = UNet(channels, options.width, options.depth, options.skips, encoder=trunk, middle=code)
        self.options, self.channels = options, channels

    @classmethod
    def unfit(cls, options: Any, num_classes: int) -> str | None:
        code = options.code
        if code is None or code.classes in (None, num_classes):
            return None
        return f"protection.code.classes is {code.classes}, allowed is null or what the data has, {num_classes}"

    @classmethod
    def uses_features(cls, options: Any, alpha: float) -> bool:
        return alpha > 0

    @classmethod
    def bits(cls, options: Any) -> float | None:
        code = options.code
        return None if code is None else code.size * math.log2(code.levels) + math.log2(code.classes or 1)

    @classmethod
    def classifies(cls, options: Any) -> bool:
        return options.code is not None and options.code.classes is not None

    def transmitted(self, protected: Tensor) -> Tensor:
        lowest = self.options.jpeg
        if lowest is None:
            return protected
        num = len(protected) // 2  # the other half arrives as it is
        coded = jpeg(protected[:num], int(torch.randint(lowest, 101, ())))
        return torch.cat((coded, protected[num:]))

    def companion(self, num_classes: int) -> nn.Module | None:
        adversary, code = self.options.adversary, self.options.code
        guided = code is not None and code.guide > 0
        return AuxiliaryNetworks(self, num_classes) if adversary is not None or guided else None

    def forward(self, images: Tensor) -> Tensor:
        # The sigmoid in float32: in bfloat16 it could not tell neighbouring 8-bit values near 1 apart.
        return torch.sigmoid(self.unet(images).float())


class Bottleneck(nn.Module):
    """Reduces features N x channels x H x W to a class, where ``classes`` says so, and ``size`` numbers of ``levels``
    values each, and draws others of ``channels_out`` channels from them.

    Finite scalar quantisation (Mentzer, Minnen, Agustsson, Tschannen 2023), of an image as a whole, with a sigmoid
    between the first value and the last; rounding passes gradients on (Bengio, Leonard, Courville 2013), and so
    does the choice of the likeliest class.
    """

    SIDE = 4  # of the features that a code is spread over, before they take the shape that is asked for
    HIDDEN = 256  # a number tells classes from others, which takes more than one plane between their features
    SHARPNESS = 4.0  # of the sigmoid at first: only images near a border shall feel that it could be moved past them
    SHARE = 0.1  # of the gradient, which rounding has made rough, that goes on to features that a guide teaches too

    def __init__(self, options: CodeOptions, channels: int, channels_out: int) -> None:
        super().__init__()
        self.options, self.channels, self.channels_out = options, channels, channels_out
        classes = options.classes or 0
        self.classify = None
        self.share = self.SHARE
        if classes:
            self.share = 0.0
            self.classify = nn.Linear(channels, classes)
            nn.init.kaiming_normal_(self.classify.weight)  # as a ResNet-20's last layer
        self.narrow = None
        if options.size:
            # Normalised, no number takes the same value for all images, which would be a part of the code unused.
            last = nn.BatchNorm1d(options.size)
            nn.init.constant_(last.weight, self.SHARPNESS)
            self.narrow = nn.Sequential(
                nn.Linear(channels, self.HIDDEN), nn.BatchNorm1d(self.HIDDEN), nn.ReLU(inplace=True),
                nn.Linear(self.HIDDEN, options.size), last,
            )  # fmt: skip
        self.widen = nn.Linear(classes + options.size, channels_out * self.SIDE**2)
        # Of the last training batch, for the guide: N x channels features, or N x classes logits, and N x (classes +
        # size) codes in [-1, 1].
        self.last: tuple[Tensor, Tensor] | None = None

    def forward(self, features: Tensor, size: tuple[int, int]) -> Tensor:
        pooled = features.mean(dim=(2, 3))
        guided = self.training and self.options.guide > 0  # gradients are held back then only: an attacker gets all
        seen, parts = pooled, []
        if self.classify is not None:
            seen = self.classify(pooled)
            # In training the encoder learns from the cross-entropy of these logits alone, as a plain classifier does.
            likely = (seen.detach() if guided else seen).float().softmax(dim=1)
            chosen = F.one_hot(likely.argmax(dim=1), likely.shape[1])
            parts.append(2 * (likely + (chosen - likely).detach()) - 1)
        if self.narrow is not None:
            top = self.options.levels - 1
            share = self.share if guided else 1.0
            exact = top * torch.sigmoid(self.narrow(share * pooled + (1 - share) * pooled.detach()).float())
            parts.append(2 * (exact + (exact.round() - exact).detach()) / top - 1)
        code = torch.cat(parts, dim=1)
        self.last = (seen, code) if guided else None
        spread: Tensor = self.widen(code).view(-1, self.channels_out, self.SIDE, self.SIDE)
        return F.interpolate(spread, size=size, mode="nearest")


class GradientReversal(torch.autograd.Function):
    """The identity, whose gradient is multiplied image by image with ``scale`` (N,), known only by then."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, scale: Tensor) -> Tensor:
        ctx.scale = scale
        return images.view_as(images)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.scale[:, None, None, None], None


class AuxiliaryNetworks(nn.Module):
    """What a learned protection is trained with: the live inverse network, the guide of its code, or both."""

    takes_features = False

    def __init__(self, protection: Learned, num_classes: int) -> None:
        super().__init__()
        options = protection.options
        self.adversary = InverseAdversary(options.adversary, protection.channels) if options.adversary else None
        self.guides = None
        if options.code is not None and options.code.guide > 0:
            # One of the features as well: through rounding alone, a short code teaches them little.
            code = protection.unet.middle
            assert isinstance(code, Bottleneck)
            of_features = nn.Linear(code.channels, num_classes) if code.classify is None else nn.Identity()
            self.guides = nn.ModuleList((of_features, nn.Linear(code.widen.in_features, num_classes)))
        self._protection = [protection]  # in a list: its weights are not this module's

    def forward(self, plain: Tensor, protected: Tensor, features: nn.Module | None, labels: Tensor) -> Tensor:
        """The losses of both in one scalar."""
        loss = protected.new_zeros(())
        if self.adversary is not None:
            loss = loss + self.adversary(plain, protected)
        if self.guides is not None:
            code = self._protection[0].unet.middle
            assert isinstance(code, Bottleneck)
            assert code.last is not None, "the guide follows a pass of the protection in training mode"
            for guide, seen in zip(self.guides, code.last, strict=True):
                loss = loss + code.options.guide * F.cross_entropy(guide(seen.float()), labels)
            code.last = None  # no graph outlives its step
        return loss


class InverseAdversary(nn.Module):
    """A live inverse network. It lowers its squared error e, h_theta the loss ``-weight * min(e, clip)`` of each image.

    One pass serves both: behind it the gradient is turned around and, for images that are past the clip, cut off.
    """

    def __init__(self, options: AdversaryOptions, channels: int) -> None:
        super().__init__()
        self.options = options
        self.unet = UNet(channels, options.width, options.depth)

    def forward(self, plain: Tensor, protected: Tensor) -> Tensor:
        """The mean squared error of the network's estimates; its gradient reaches h_theta as described."""
        uploaded = protected + (quantize_8bit(protected.detach()) - protected.detach())  # rounding passes gradients on
        scale = torch.zeros(len(plain), device=plain.device)
        estimate = torch.sigmoid(self.unet(GradientReversal.apply(uploaded, scale)).float())
        errors = (estimate - plain).square().mean(dim=(1, 2, 3))
        scale.copy_(torch.where(errors.detach() < self.options.clip, -self.options.weight, 0.0))
        return errors.mean()
