"""The interface of every protection."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from raypp.utils.images import to_uint8
from raypp.utils.keys import Key
from raypp.utils.registry import MethodConfig


class Protection(nn.Module):
    """Maps plain images N x C x H x W in [0, 1] to protected images of the same range.

    Subclasses define ``forward`` (differentiable where the method is trained) and name their options model. The
    constructor takes the options, the number of ``channels`` and, if :meth:`needs_key` returns True, a ``key``.
    """

    Options: ClassVar[type[MethodConfig]]
    trained: ClassVar[bool] = False
    """Whether it has weights that train with the classifier's."""
    differentiable: ClassVar[bool] = False
    """Whether gradients of its output reach its input."""
    hides: ClassVar[bool] = True
    """Whether its images should look different from plain ones."""
    adaptation: ClassVar[str] = "none"
    """The adaptation network in front of a classifier of its images."""
    least_side: ClassVar[int] = 1
    """Minimum height and width in pixels."""
    augment: ClassVar[Literal["before", "after"]] = "before"
    """Whether training images are cropped and flipped before or after they are protected."""
    noise_std: float | None = None
    """Standard deviation in gray levels of independent Gaussian noise that it adds to each value before clipping and
    rounding; None if it states no noise. The attack ``known_gallery`` uses it."""
    key: Key
    """Its secret key; set only if :meth:`needs_key` returns True."""

    def __init__(self, options: Any, *, channels: int = 3, key: Key | None = None) -> None:
        super().__init__()
        self.options, self.channels = options, channels
        if self.needs_key(options):
            if key is None:
                raise ValueError(f"protection {options.name!r} needs its key")
            self.key = key

    @classmethod
    def needs_key(cls, options: Any) -> bool:
        """Return whether these options need a secret key."""
        return False

    @classmethod
    def problem(cls, options: Any, channels: int) -> str | None:
        """Return why these options cannot protect images with this number of channels, or None if they can."""
        return None

    @classmethod
    def unfit(cls, options: Any, num_classes: int) -> str | None:
        """Return why these options do not suit data with this number of classes, or None if they do."""
        return None

    @classmethod
    def uses_features(cls, options: Any, alpha: float) -> bool:
        """Return whether its training compares images in the feature network."""
        return False

    @classmethod
    def bits(cls, options: Any) -> float | None:
        """Return an upper bound on the bits that a protected image reveals, or None if no bound is known."""
        return None

    @classmethod
    def classifies(cls, options: Any) -> bool:
        """Return whether the protection itself predicts the class, so that protected images reveal it."""
        return False

    def transmitted(self, protected: Tensor) -> Tensor:
        """Simulate the upload in training: what the classifier receives, N x C x H x W in [0, 1]; differentiable."""
        return protected

    def build_auxiliary_networks(self, num_classes: int, image_size: tuple[int, int]) -> AuxiliaryNetworks | None:
        """Build auxiliary networks that train with the protection and are then discarded, such as a discriminator.

        Args:
            image_size: height and width of training images.
        """
        return None

    def aligned(self, images: Tensor) -> Tensor:
        """Return plain images N x C x H x W in the shape of their protected ones, to compare the two."""
        return images

    @torch.inference_mode()
    def protect(self, images: Tensor) -> Tensor:
        """Return the protected images that a client uploads, uint8, from uint8 images N x C x H x W."""
        return to_uint8(self(images.float() / 255))


class AuxiliaryNetworks(nn.Module):
    """Networks that train with a protection.

    ``forward(plain, protected, features, labels)`` returns a loss that is added to the classifier's. ``plain`` and
    ``protected`` are N x C x H x W in [0, 1], ``features`` is the feature network or None, ``labels`` are (N,).
    """

    uses_feature_loss: ClassVar[bool] = False
    """Whether its own feature loss replaces Eq. 4's distance."""

    def reinitialize(self) -> list[nn.Parameter]:
        """Initialize networks again that are due; called after each step of the optimizer. Return their parameters."""
        return []
