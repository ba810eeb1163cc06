"""No protection: the baseline of every accuracy and leakage."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from raypp.protections.base import Protection
from raypp.utils.registry import MethodConfig


class Plain(Protection):
    """Returns the image as it is."""

    class Options(MethodConfig):
        name: Literal["plain"] = "plain"

    differentiable = True
    hides = False

    def forward(self, images: Tensor) -> Tensor:
        return images
