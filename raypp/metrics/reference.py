"""PSNR and SSIM by scikit-image, the reference implementation: one pair of images after the other, on the CPU.

All images are float N x C x H x W in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio of each pair in dB; infinite for identical images."""
    from skimage.metrics import peak_signal_noise_ratio

    with np.errstate(divide="ignore"):
        return _each(lambda x, y: peak_signal_noise_ratio(x, y, data_range=1), a, b)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Return SSIM as defined by Wang, Bovik, Sheikh, Simoncelli 2004, see :func:`raypp.metrics.image.ssim`."""
    return _ssim(a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)


def ssim_lab(a: Tensor, b: Tensor) -> Tensor:
    """Return SSIM with scikit-image's defaults, see :func:`raypp.metrics.image.ssim_lab`."""
    return _ssim(a, b)


def _ssim(a: Tensor, b: Tensor, **options: Any) -> Tensor:
    from skimage.metrics import structural_similarity

    return _each(lambda x, y: structural_similarity(x, y, data_range=1, channel_axis=0, **options), a, b)


def _each(metric: Callable[[np.ndarray, np.ndarray], Any], a: Tensor, b: Tensor) -> Tensor:
    pairs = zip(a.double().cpu().numpy(), b.double().cpu().numpy(), strict=True)
    return torch.tensor([float(metric(x, y)) for x, y in pairs], dtype=torch.float32, device=a.device)
