"""What every protection is."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from raypp.images import to_uint8
from raypp.registry import Options


class Protection(nn.Module):
    """Maps plain images N x C x H x W in [0, 1] to protected images of the same shape and range.

    Subclasses define ``forward`` (differentiable where the method is trained) and name their options model.
    """

    Options: ClassVar[type[Options]]

    @torch.inference_mode()
    def protect(self, images: Tensor) -> Tensor:
        """Return what a client uploads: protected images as uint8, from uint8 images N x C x H x W."""
        return to_uint8(self(images.float() / 255))
