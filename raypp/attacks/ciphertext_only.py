"""T0: attacks on protected images alone, without training. They run on any image.

``feature_reconstruction`` and ``minimum_difference`` target pixel-based encryption. Source: Chang, Case, "Attacks on
image encryption schemes for privacy-preserving deep neural networks" (2020, arXiv 2004.13263), basic and advanced
attack under different keys.
"""

from __future__ import annotations

from itertools import permutations, product
from typing import ClassVar, Literal

import torch
from torch import Tensor

from raypp.attacks.base import Attack, AttackError, Threat, match_shape
from raypp.utils.registry import MethodConfig


class ProtectedImage(Attack):
    """Takes the protected image itself as the estimate: what a person sees without any computation."""

    class Options(MethodConfig):
        name: Literal["protected_image"] = "protected_image"

    threat: ClassVar[Threat] = Threat.T0
    matcher: ClassVar[str] = "edges"  # a protected image may keep contours without brightness

    def reconstruct(self, protected: Tensor) -> Tensor:
        return match_shape(protected, self.access.shape)


class FeatureReconstruction(Attack):
    """Folds every value to one half of the range, so that ``v`` and ``255 - v`` become the same under every key."""

    class Options(MethodConfig):
        name: Literal["feature_reconstruction"] = "feature_reconstruction"
        bright: bool = False
        """Invert the values of the lower half instead of those of the upper one."""

    threat: ClassVar[Threat] = Threat.T0
    matcher: ClassVar[str] = "edges"  # folded values keep contours, not brightness

    def reconstruct(self, protected: Tensor) -> Tensor:
        protected = match_shape(protected, self.access.shape)
        both = torch.maximum if self.options.bright else torch.minimum
        return both(protected, 255 - protected)


class MinimumDifference(Attack):
    """Decodes pixel by pixel: of the 48 possible values of a pixel, it takes the one nearest to its neighbor's.

    The neighbor is the pixel above, or in the first row the pixel to the left. The first pixel stays as it is; if it is
    wrong, the image has other colors and is just as readable.
    """

    class Options(MethodConfig):
        name: Literal["minimum_difference"] = "minimum_difference"

    threat: ClassVar[Threat] = Threat.T0
    matcher: ClassVar[str] = "edges"  # its colors may be wrong

    def prepare(self) -> None:
        if self.access.shape[0] != 3:
            raise AttackError("attack minimum_difference needs images of 3 channels")

    def reconstruct(self, protected: Tensor) -> Tensor:
        _, height, width = self.access.shape
        values = match_shape(protected, self.access.shape).permute(2, 3, 0, 1).to(torch.int16)  # (H, W, N, 3)
        orders = torch.tensor(list(permutations(range(3))), device=protected.device)
        signs = torch.tensor(list(product((0, 255), repeat=3)), dtype=torch.int16, device=protected.device)
        decoded = values.clone()

        def nearest(pixels: Tensor, neighbors: Tensor) -> Tensor:
            """Pixels and neighbors (K, 3)."""
            candidates = (pixels[:, None, :] ^ signs)[:, :, orders].flatten(1, 2)  # (K, 48, 3)
            best = (candidates - neighbors[:, None]).abs().sum(2).argmin(1)
            return candidates[torch.arange(len(pixels), device=pixels.device), best]

        for x in range(1, width):
            decoded[0, x] = nearest(values[0, x], decoded[0, x - 1])
        for y in range(1, height):  # a row at a time, since its pixels depend only on the row above
            decoded[y] = nearest(values[y].flatten(0, 1), decoded[y - 1].flatten(0, 1)).view_as(decoded[y])
        return decoded.permute(2, 3, 0, 1).to(torch.uint8)
