"""No protection: the baseline of every accuracy and leakage."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from raypp.protections.base import Protection
from raypp.utils.keys import Key
from raypp.utils.registry import MethodConfig


class PlainOptions(MethodConfig):
    name: Literal["plain"] = "plain"


class Plain(Protection):
    """Returns the image as it is."""

    Options = PlainOptions
    differentiable = True
    hides = False

    def __init__(self, options: PlainOptions, *, channels: int = 3, key: Key | None = None) -> None:
        super().__init__()

    def forward(self, images: Tensor) -> Tensor:
        return images
