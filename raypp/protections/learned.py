"""The learned protection h_theta: a U-Net whose sigmoid output is the protected image.

Source: Ito, Kinoshita, Kiya 2020 (arXiv 2008.03143), section II; output range as in the authors' released code. The
adversary (see :mod:`raypp.protections.adversary`) and the code are ours. The code follows finite scalar quantization
(Mentzer et al. 2023).
"""

from __future__ import annotations

import math
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import BaseModel, Field, model_validator
from torch import Tensor, nn

from raypp.models.jpeg import jpeg
from raypp.models.layers import straight_through
from raypp.models.resnet import ResNetOptions, ResNetTrunk
from raypp.models.unet import UNet
from raypp.protections.adversary import AdversaryOptions, ContrastiveAdversary, ImageSize, InversePool
from raypp.protections.base import AuxiliaryNetworks, Protection
from raypp.utils.keys import Key
from raypp.utils.registry import MethodConfig


class CodeOptions(BaseModel):
    """A short code of integers; the protected image is generated from it alone."""

    model_config = MethodConfig.model_config

    size: int = Field(10, ge=0, le=4096)
    """Number of integers; 0 is allowed with ``classes`` only."""
    levels: int = Field(2, ge=2, le=256)
    """Number of values of each integer. A protected image reveals at most ``size * log2(levels)`` bits, plus
    ``log2(classes)`` with ``classes``."""
    classes: int | None = Field(None, ge=2)
    """Number of classes of the data: the code then starts with the class that the encoder predicts; null: no class."""
    encoder: ResNetOptions | None = None
    """Computes the features that the code is made from: a ResNet-20 without its last layer, or, if null, the U-Net's
    encoder. With a ResNet-20, ``width`` and ``depth`` describe the decoder only."""
    guide: float = Field(1.0, ge=0)
    """Weight of the cross-entropies of two auxiliary linear classifiers, one of the pooled features and one of the
    code. They train encoder and code earlier than the classifier of protected images does; 0 omits them. With
    ``classes`` the first one selects the class, and it alone trains the encoder."""

    @model_validator(mode="after")
    def _check_size_and_guide(self) -> CodeOptions:
        if self.classes is None and self.size == 0:
            raise ValueError("size is 0, allowed without classes is at least 1: the code would be empty")
        if self.classes is not None and self.guide == 0:
            raise ValueError("guide is 0, allowed with classes is more than 0: nothing else trains the encoder")
        return self


class Learned(Protection):
    """U-Net with a sigmoid; any H and W, preferably multiples of ``2**depth``."""

    class Options(MethodConfig):
        name: Literal["learned"] = "learned"
        width: int = Field(64, ge=1, le=1024)
        """Channels of the U-Net's first level."""
        depth: int = Field(4, ge=1, le=6)
        """Number of 2x2 poolings of the U-Net."""
        skips: int | None = Field(None, ge=0)
        """Number of skip connections, counted from the deepest level; null keeps all."""
        code: CodeOptions | None = None
        """Reduce each image to a short code; needs skips 0. Null: no code."""
        jpeg: int | None = Field(None, ge=1, le=100)
        """Lowest JPEG quality for training: half of the images are encoded, for uploads that are re-encoded. Null:
        none."""
        adversary: AdversaryOptions | None = None
        """Also train against live inverse networks; null trains as in the paper."""

        @model_validator(mode="after")
        def _check_combination(self) -> Self:
            if self.skips is not None and self.skips > self.depth:
                raise ValueError(f"skips is {self.skips}, allowed is at most depth = {self.depth}")
            if self.code is not None and self.skips != 0:
                raise ValueError(f"skips is {self.skips}, allowed with a code is 0: a skip connection bypasses it")
            if self.code is not None and self.code.classes is not None and self.adversary is not None:
                raise ValueError(
                    f"code.classes is {self.code.classes}, allowed with an adversary is null: an adversary's gradient "
                    "does not reach the layer that selects the class"
                )
            return self

    differentiable = True
    trained = True

    def __init__(self, options: Options, *, channels: int = 3, key: Key | None = None) -> None:
        super().__init__(options, channels=channels, key=key)
        deepest = options.width * 2**options.depth
        trunk, code = None, None
        if options.code is not None:
            trunk = ResNetTrunk(options.code.encoder, channels) if options.code.encoder is not None else None
            code = Bottleneck(options.code, trunk.channels_out if trunk is not None else deepest, deepest)
        self.unet = UNet(channels, options.width, options.depth, options.skips, encoder=trunk, middle=code)

    @classmethod
    def unfit(cls, options: Any, num_classes: int) -> str | None:
        code = options.code
        if code is None or code.classes in (None, num_classes):
            return None
        return f"protection.code.classes is {code.classes}, allowed is null or the data's number, {num_classes}"

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
        num_encoded = len(protected) // 2
        encoded = jpeg(protected[:num_encoded], int(torch.randint(lowest, 101, ())))
        return torch.cat((encoded, protected[num_encoded:]))

    def build_auxiliary_networks(self, num_classes: int, image_size: ImageSize) -> AuxiliaryNetworks | None:
        adversary, code = self.options.adversary, self.options.code
        has_guides = code is not None and code.guide > 0
        return AdversariesAndGuides(self, num_classes, image_size) if adversary is not None or has_guides else None

    def logits(self, images: Tensor) -> Tensor:
        """Return the output before the sigmoid, float32 N x C x H x W without bounds."""
        logits: Tensor = self.unet(images).float()
        return logits

    def forward(self, images: Tensor) -> Tensor:
        # The sigmoid in float32: near 1, bfloat16 does not separate adjacent 8-bit values.
        return torch.sigmoid(self.logits(images))


class Bottleneck(nn.Module):
    """Reduces features N x channels x H x W to a code of an optional class and ``size`` integers of ``levels`` values.

    Its output, features with ``channels_out`` channels, depends on the code alone.

    Source: finite scalar quantization (Mentzer, Minnen, Agustsson, Tschannen 2023) of a whole image, with a sigmoid
    over the range of values. Rounding and argmax use straight-through gradients (Bengio, Leonard, Courville 2013).
    """

    SIDE = 4  # of the feature map that a code is projected to, before it is resized
    HIDDEN = 256  # units of the hidden layer: one plane does not separate the classes that an integer must separate
    SHARPNESS = 4.0  # initial scale of the sigmoid's input, so that only images near a border receive large gradients
    SHARE = 0.1  # share of the gradient, rough after rounding, that reaches features that a guide trains as well

    def __init__(self, options: CodeOptions, channels: int, channels_out: int) -> None:
        super().__init__()
        self.options, self.channels, self.channels_out = options, channels, channels_out
        classes = options.classes or 0
        self.classify = nn.Linear(channels, classes) if classes else None
        if self.classify is not None:
            nn.init.kaiming_normal_(self.classify.weight)  # as the last layer of ResNet-20
        self.narrow = None
        if options.size:
            # Normalization prevents an integer with one value for all images, which would waste a part of the code.
            norm = nn.BatchNorm1d(options.size)
            nn.init.constant_(norm.weight, self.SHARPNESS)
            self.narrow = nn.Sequential(
                nn.Linear(channels, self.HIDDEN), nn.BatchNorm1d(self.HIDDEN), nn.ReLU(inplace=True),
                nn.Linear(self.HIDDEN, options.size), norm,
            )  # fmt: skip
        self.widen = nn.Linear(classes + options.size, channels_out * self.SIDE**2)
        # The guides' inputs of the latest training batch: features N x channels (with classes: logits N x classes) and
        # codes N x (classes + size) in [-1, 1].
        self.last: tuple[Tensor, Tensor] | None = None

    def forward(self, features: Tensor, size: tuple[int, int]) -> Tensor:
        pooled = features.mean(dim=(2, 3))
        is_guided = self.training and self.options.guide > 0  # otherwise no gradient is blocked: an attacker gets all
        guide_input, parts = pooled, []
        if self.classify is not None:
            guide_input = logits = self.classify(pooled)
            # In training, only the cross-entropy of these logits trains the encoder, as in a plain classifier.
            probabilities = (logits.detach() if is_guided else logits).float().softmax(dim=1)
            one_hot = F.one_hot(probabilities.argmax(dim=1), probabilities.shape[1])
            parts.append(2 * straight_through(probabilities, one_hot) - 1)
        if self.narrow is not None:
            max_value = self.options.levels - 1
            inputs = pooled
            if is_guided:
                share = self.SHARE if self.classify is None else 0.0
                inputs = share * pooled + (1 - share) * pooled.detach()
            values = max_value * torch.sigmoid(self.narrow(inputs).float())
            parts.append(2 * straight_through(values, values.round()) / max_value - 1)
        code = torch.cat(parts, dim=1)
        self.last = (guide_input, code) if is_guided else None
        feature_map: Tensor = self.widen(code).view(-1, self.channels_out, self.SIDE, self.SIDE)
        return F.interpolate(feature_map, size=size, mode="nearest")


class AdversariesAndGuides(AuxiliaryNetworks):
    """The auxiliary networks of a learned protection: its adversaries, the guides of its code, or both."""

    def __init__(self, protection: Learned, num_classes: int, image_size: ImageSize) -> None:
        super().__init__()
        options, channels = protection.options, protection.channels
        self.inverse_pool = self.contrastive = self.guides = None
        if options.adversary is not None:
            self.inverse_pool = InversePool(options.adversary, channels, image_size)
            if options.adversary.contrastive:
                self.contrastive = ContrastiveAdversary(options.adversary.contrastive, channels, image_size)
        if options.code is not None and options.code.guide > 0:
            # The features have a guide as well: the rounded code passes little information to them.
            code = protection.unet.middle
            assert isinstance(code, Bottleneck)
            of_features = nn.Linear(code.channels, num_classes) if code.classify is None else nn.Identity()
            self.guides = nn.ModuleList((of_features, nn.Linear(code.widen.in_features, num_classes)))
            self._code = [code]  # in a list: its weights are not this module's

    def forward(self, plain: Tensor, protected: Tensor, features: nn.Module | None, labels: Tensor) -> Tensor:
        """Return the sum of all losses."""
        loss = protected.new_zeros(())
        for adversary in (self.inverse_pool, self.contrastive):
            if adversary is not None:
                loss = loss + adversary(plain, protected)
        if self.guides is not None:
            (code,) = self._code
            assert code.last is not None, "a guide needs a forward pass of the protection in training mode"
            for guide, guide_input in zip(self.guides, code.last, strict=True):
                loss = loss + code.options.guide * F.cross_entropy(guide(guide_input.float()), labels)
            code.last = None  # frees the graph
        return loss

    def reinitialize(self) -> list[nn.Parameter]:
        return self.inverse_pool.reinitialize() if self.inverse_pool is not None else []
