"""Image similarity per image, in batches on any device; pinned by tests to scikit-image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each pair of images N x C x H x W in [0, 1]; infinite for identical ones."""
    mse = (a.float() - b.float()).square().mean(dim=(1, 2, 3))
    return -10 * torch.log10(mse)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of each pair of images N x C x H x W in [0, 1], sides of at least 11 pixels.

    Source: Wang, Bovik, Sheikh, Simoncelli 2004: 11 x 11 Gaussian window with sigma 1.5, K1 = 0.01, K2 = 0.03, mean
    over window positions that lie inside the image, then over channels.
    """
    channels = a.shape[1]
    offsets = torch.arange(-5, 6, device=a.device, dtype=torch.float64)
    kernel = torch.exp(-offsets.square() / (2 * 1.5**2))
    kernel = kernel / kernel.sum()

    def blur(x: Tensor) -> Tensor:
        x = F.conv2d(x, kernel.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)
        return F.conv2d(x, kernel.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)

    # float64: the variances are small differences of squares; float32 is wrong by 3e-4 on smooth bright images.
    a, b = a.double(), b.double()
    mean_a, mean_b = blur(a), blur(b)
    variance_a = blur(a * a) - mean_a.square()
    variance_b = blur(b * b) - mean_b.square()
    covariance = blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    score = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    score = score / ((mean_a.square() + mean_b.square() + c1) * (variance_a + variance_b + c2))
    return score.mean(dim=(1, 2, 3)).float()
