"""No protection: the baseline that every accuracy and every leakage stands beside."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from raypp.protections.base import Protection
from raypp.utils import registry
from raypp.utils.keys import Key


class PlainOptions(registry.MethodConfig):
    name: Literal["plain"] = "plain"


class Plain(Protection):
    """Returns the image as it is."""

    Options: ClassVar[type[registry.MethodConfig]] = PlainOptions
    differentiable: ClassVar[bool] = True
    hides: ClassVar[bool] = False

    def __init__(self, options: PlainOptions, *, channels: int = 3, key: Key | None = None) -> None:
        super().__init__()

    def forward(self, images: Tensor) -> Tensor:
        return images
