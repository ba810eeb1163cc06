"""The learned protection h_theta: a U-Net whose sigmoid output is the protected image.

Source: Ito, Kinoshita, Kiya 2020 (arXiv 2008.03143), section II; output range as in the authors' released code.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from raypp import registry
from raypp.keys import Key
from raypp.nets.unet import UNet
from raypp.protections.base import Protection


class LearnedOptions(registry.Options):
    name: Literal["learned"] = "learned"
    width: int = Field(64, ge=1, le=1024)
    """Channels of the U-Net's first level."""
    depth: int = Field(4, ge=1, le=6)
    """Number of 2x2 poolings of the U-Net."""
    skips: int | None = Field(None, ge=0)
    """Skip connections kept, counted from the deepest level; null keeps all."""

    @model_validator(mode="after")
    def _skips_within_depth(self) -> LearnedOptions:
        if self.skips is not None and self.skips > self.depth:
            raise ValueError(f"skips is {self.skips}, allowed is at most depth = {self.depth}")
        return self


class Learned(Protection):
    """U-Net with a sigmoid; any H and W, best in multiples of ``2**depth``."""

    Options: ClassVar[type[registry.Options]] = LearnedOptions
    differentiable: ClassVar[bool] = True
    trained: ClassVar[bool] = True

    def __init__(self, options: LearnedOptions, *, channels: int = 3, key: Key | None = None) -> None:
        super().__init__()
        self.unet = UNet(channels, options.width, options.depth, options.skips)

    @classmethod
    def uses_features(cls, options: Any, alpha: float) -> bool:
        return alpha > 0

    def forward(self, images: Tensor) -> Tensor:
        # The sigmoid in float32: in bfloat16 it could not tell neighbouring 8-bit values near 1 apart.
        return torch.sigmoid(self.unet(images).float())
