"""Values and logits of protected images, standardized at each position."""

from __future__ import annotations

import torch
from torch import Tensor, nn

LOGIT_EPS = 0.5 / 255  # minimum distance of a value from 0 and 1, whose logits are infinite
MIN_STD = (0.02, 0.2)  # of a value and of its logit, so that nearly constant positions keep a small scale
MAX_ZSCORE = 8.0  # largest distance of a standardized value from its mean, in standard deviations


class StandardizedLogits(nn.Module):
    """Maps images N x C x H x W in [0, 1] to their values and logits N x 2C x H x W, standardized at each position.

    Logits expand small differences near 0 and 1, and standardizing amplifies those between images that look alike.

    Args:
        channels: C.
        size: (H, W).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(1, 2 * channels, *size))
        self.register_buffer("std", torch.ones(1, 2 * channels, *size))

    @torch.no_grad()
    def fit(self, values: Tensor) -> None:
        """Set mean and standard deviation of every position from images N x C x H x W."""
        features = self._with_logits(values)
        min_std = features.new_tensor(MIN_STD).repeat_interleave(values.shape[1])[None, :, None, None]
        self.mean.copy_(features.mean(0, keepdim=True))
        self.std.copy_(features.std(0, correction=0, keepdim=True).maximum(min_std))

    def forward(self, values: Tensor) -> Tensor:
        return ((self._with_logits(values) - self.mean) / self.std).clamp(-MAX_ZSCORE, MAX_ZSCORE)

    @staticmethod
    def _with_logits(values: Tensor) -> Tensor:
        return torch.cat((values, torch.logit(values.clamp(LOGIT_EPS, 1 - LOGIT_EPS))), dim=1)
