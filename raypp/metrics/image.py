"""What images have in common, image by image, in batches on any device; pinned by tests to scikit-image.

Images are float N x C x H x W in [0, 1] throughout.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

ALEXNET = "alexnet-owt-7be5be79.pth"  # torchvision's name for the weights that LPIPS builds on
MIN_SIDE = 11  # of SSIM's window
LPIPS_SIDE = 32
BATCH = 1000  # images that LPIPS compares at a time
PART_VALUES = 2**25  # values of images that are compared in float64 at a time, which bounds memory
SSIM_VALUES = 2**16  # values of a batch of SSIM, which takes some 40 times their size: more of them leave the cache


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each pair of images; infinite for identical ones."""
    mse = (a.float() - b.float()).square().mean(dim=(1, 2, 3))
    return -10 * torch.log10(mse)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of each pair of images, sides of at least 11 pixels.

    Source: Wang, Bovik, Sheikh, Simoncelli 2004: 11 x 11 Gaussian window with sigma 1.5, K1 = 0.01, K2 = 0.03, mean
    over window positions that lie inside the image, then over channels.
    """
    return _ssim(a, b, _gaussian(), covariance_scale=1.0)


def ssim_lab(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity as the paper's authors compute it later: 7 x 7 uniform window, sample covariance.

    Source: scikit-image's ``structural_similarity`` with its defaults. Sides of at least 7 pixels.
    """
    return _ssim(a, b, (1 / 7,) * 7, covariance_scale=49 / 48)


def ssim_for_loss(a: Tensor, b: Tensor) -> Tensor:
    """As :func:`ssim`, in float32 and differentiable with finite gradients: close enough to learn by, not to report."""
    with torch.autocast(a.device.type, enabled=False):  # in bf16 the variances would be nothing but rounding
        return _ssim_batch(a.float(), b.float(), _gaussian(), covariance_scale=1.0)


def ssim_invariant(a: Tensor, b: Tensor) -> Tensor:
    """The larger SSIM of ``a`` with ``b`` and with the negative of ``b``: a person reads a negative as well."""
    return torch.maximum(ssim(a, b), ssim(a, 1 - b))


@lru_cache(maxsize=1)
def load_lpips() -> nn.Module | None:
    """LPIPS (Zhang, Isola, Efros, Shechtman, Wang 2018) with AlexNet, as the package ``lpips`` has it.

    None where that package is not installed or torch's hub folder does not hold AlexNet's weights: nothing is
    downloaded behind the user's back.
    """
    if not (Path(torch.hub.get_dir()) / "checkpoints" / ALEXNET).exists():  # first: the import takes seconds
        return None
    try:
        from lpips import LPIPS
    except ImportError:
        return None
    net: nn.Module = LPIPS(net="alex", version="0.1", verbose=False)
    return net.eval().requires_grad_(False)


@torch.inference_mode()
def lpips(a: Tensor, b: Tensor) -> Tensor | None:
    """Perceptual distance of each pair of images, 0 for identical ones; None where LPIPS cannot be had.

    Sides of at least 32 pixels; grey images are taken as RGB.
    """
    net = load_lpips()
    if net is None or min(a.shape[-2:]) < LPIPS_SIDE:
        return None
    net.to(a.device)
    pairs = zip(a.split(BATCH), b.split(BATCH), strict=True)
    return torch.cat(
        [net(x.expand(-1, 3, -1, -1), y.expand(-1, 3, -1, -1), normalize=True).flatten() for x, y in pairs]
    )


def edge_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Correlation of the gradient magnitudes of each pair of images, in [-1, 1]; 0 where one of them has no edge.

    Central differences of the luma; blind to polarity and brightness, so that it sees contours that PSNR and SSIM miss.
    """
    return (edge_maps(a) * edge_maps(b)).sum(1)


def edge_maps(images: Tensor) -> Tensor:
    """Gradient magnitudes float64 (N, D), centred and of length 1, whose products are correlations; 0 without edges."""
    found = _edges(images)
    found = found - found.mean(dim=1, keepdim=True)
    norm = found.norm(dim=1, keepdim=True)
    return torch.where(norm > 1e-6, found / norm.clamp_min(1e-6), torch.zeros_like(found))


def _gaussian() -> tuple[float, ...]:
    window = np.exp(-np.square(np.arange(-5, 6)) / (2 * 1.5**2))
    return tuple(window / window.sum())


def _edges(images: Tensor) -> Tensor:
    weights = (0.299, 0.587, 0.114) if images.shape[1] == 3 else (1 / images.shape[1],) * images.shape[1]
    luma = (images.double() * torch.tensor(weights, device=images.device).view(1, -1, 1, 1)).sum(1)
    across = (luma[:, 1:-1, 2:] - luma[:, 1:-1, :-2]) / 2
    down = (luma[:, 2:, 1:-1] - luma[:, :-2, 1:-1]) / 2
    return (across.square() + down.square()).sqrt().flatten(1)


def _ssim(a: Tensor, b: Tensor, window: tuple[float, ...], covariance_scale: float) -> Tensor:
    num = max(1, SSIM_VALUES // max(1, a[:1].numel()))
    scores = [
        _ssim_batch(a[i : i + num].float(), b[i : i + num].float(), window, covariance_scale)
        for i in range(0, len(a), num)
    ]
    return torch.cat(scores) if scores else a.new_zeros(0, dtype=torch.float32)


def _ssim_batch(a: Tensor, b: Tensor, window: tuple[float, ...], covariance_scale: float) -> Tensor:
    height, width = a.shape[-2:]
    rows = _band(window, height).to(a)
    columns = _band(window, width).to(a).t()
    # Variances are small differences of squares, in float32 wrong by 3e-4 on smooth bright images, so each image is
    # centred first: that changes no variance, and squares of small numbers are exact enough.
    centre_a, centre_b = a.mean(dim=(2, 3), keepdim=True), b.mean(dim=(2, 3), keepdim=True)
    a, b = a - centre_a, b - centre_b
    # A window at every position, as two matrix products: many times faster than a convolution on a CPU.
    # Of the two variances only the sum is asked for.
    mean_a, mean_b, squares, product = rows @ torch.stack((a, b, a * a + b * b, a * b)) @ columns
    variances = covariance_scale * (squares - mean_a.square() - mean_b.square())
    covariance = covariance_scale * (product - mean_a * mean_b)
    mean_a, mean_b = mean_a + centre_a, mean_b + centre_b
    c1, c2 = 0.01**2, 0.03**2
    score = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    score = score / ((mean_a.square() + mean_b.square() + c1) * (variances + c2))
    averages: Tensor = score.mean(dim=(1, 2, 3)).float()
    return averages


@lru_cache(maxsize=16)
def _band(window: tuple[float, ...], side: int) -> Tensor:
    """A matrix (side - len(window) + 1, side) whose rows hold the window at every position inside an image."""
    positions = side - len(window) + 1
    if positions < 1:
        raise ValueError(f"images must have sides of at least {len(window)} pixels, found {side}")
    band = torch.zeros(positions, side, dtype=torch.float64)
    for offset, weight in enumerate(window):
        band.diagonal(offset).fill_(weight)
    return band


def in_parts(values: Tensor, images: Tensor | None = None) -> tuple[Tensor, ...]:
    """Split ``values`` (N, ...) into the parts in which ``images`` (N, ...) are compared."""
    images = values if images is None else images
    parts: tuple[Tensor, ...] = values.split(max(1, PART_VALUES // max(1, images.shape[1:].numel())))
    return parts
