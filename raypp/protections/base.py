"""What every protection is."""

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
    constructor takes the options, the number of ``channels`` and, where :meth:`needs_key` says so, a ``key``.
    """

    Options: ClassVar[type[MethodConfig]]
    trained: ClassVar[bool] = False
    """Whether it has weights that are trained with the classifier's."""
    differentiable: ClassVar[bool] = False
    """Whether gradients of its output reach its input."""
    hides: ClassVar[bool] = True
    """Whether its images are meant to look otherwise than plain ones."""
    adaptation: ClassVar[str] = "none"
    """The adaptation network that goes in front of a classifier of its images."""
    least_side: ClassVar[int] = 1
    """Pixels that height and width must have at least."""
    augment: ClassVar[Literal["before", "after"]] = "before"
    """Whether training images are cropped and flipped before they are protected, or after."""

    @classmethod
    def needs_key(cls, options: Any) -> bool:
        """Whether these options describe a protection with a secret key."""
        return False

    @classmethod
    def problem(cls, options: Any, channels: int) -> str | None:
        """Why images of so many channels cannot be protected with these options; None if they can."""
        return None

    @classmethod
    def unfit(cls, options: Any, num_classes: int) -> str | None:
        """Why these options do not suit data of so many classes; None if they do."""
        return None

    @classmethod
    def uses_features(cls, options: Any, alpha: float) -> bool:
        """Whether its training compares images in a feature network."""
        return False

    @classmethod
    def bits(cls, options: Any) -> float | None:
        """How many bits of an image its protected one tells at most, whoever looks at it; None: no bound is known."""
        return None

    @classmethod
    def classifies(cls, options: Any) -> bool:
        """Whether the protection itself decides on the class, so that whoever sees a protected image can tell it."""
        return False

    def transmitted(self, protected: Tensor) -> Tensor:
        """In training, what the classifier gets of protected images N x C x H x W in [0, 1]; differentiable."""
        return protected

    def companion(self, num_classes: int) -> nn.Module | None:
        """A network that is trained beside the protection and then thrown away, such as a discriminator.

        Its ``forward(plain, protected, features, labels)`` gives a loss that is added to the classifier's. Where its
        attribute ``takes_features`` is true it compares images in the feature network itself, in place of Eq. 4's
        distance.
        """
        return None

    def aligned(self, images: Tensor) -> Tensor:
        """Plain images N x C x H x W in the shape of their protected ones, to compare the two."""
        return images

    @torch.inference_mode()
    def protect(self, images: Tensor) -> Tensor:
        """Return what a client uploads: protected images as uint8, from uint8 images N x C x H x W."""
        return to_uint8(self(images.float() / 255))


def require_key(key: Key | None, name: str) -> Key:
    """The key of a keyed protection, which whoever builds it has to bring."""
    if key is None:
        raise ValueError(f"protection {name!r} needs its key")
    return key
