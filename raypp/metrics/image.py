"""Similarity of image pairs, in batches on any device.

:func:`use_backend` selects scikit-image for PSNR and SSIM instead (:mod:`raypp.metrics.reference`), which tests compare
them with.

All images are float N x C x H x W in [0, 1].
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raypp.metrics import reference

_backend: ContextVar[str] = ContextVar("_backend", default="torch")

ALEXNET = "alexnet-owt-7be5be79.pth"  # torchvision's file of the weights that LPIPS uses
MAX_PSNR = 60.0  # dB: identical images would make a mean infinite, and JSON has no infinity
MIN_SIDE = 11  # pixels, the side of SSIM's window
LPIPS_MIN_SIDE = 32  # pixels
LPIPS_BATCH = 1000  # images per forward pass
PART_VALUES = 2**25  # image values that are compared in float64 at a time, which bounds memory
SSIM_VALUES = 2**16  # image values of an SSIM batch, which needs about 40 times their size: more do not fit the cache

_weights = np.exp(-np.square(np.arange(-5, 6)) / (2 * 1.5**2))
GAUSSIAN: tuple[float, ...] = tuple(_weights / _weights.sum())
"""SSIM's window in one dimension."""


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Compute PSNR and SSIM with ``torch``, in batches, or with ``skimage``, the reference implementation."""
    token = _backend.set(backend)
    try:
        yield
    finally:
        _backend.reset(token)


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio of each pair in dB; infinite for identical images."""
    if _backend.get() == "skimage":
        return reference.psnr(a, b)
    mse = (a.float() - b.float()).square().mean(dim=(1, 2, 3))
    return -10 * torch.log10(mse)


def finite_psnr(a: Tensor, b: Tensor) -> Tensor:
    """Return :func:`psnr`, at most ``MAX_PSNR``."""
    return psnr(a, b).clamp_max(MAX_PSNR)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Return the structural similarity of each pair; sides of at least 11 pixels.

    Source: Wang, Bovik, Sheikh, Simoncelli 2004: 11 x 11 Gaussian window with sigma 1.5, K1 = 0.01, K2 = 0.03, mean
    over window positions inside the image, then over channels.
    """
    if _backend.get() == "skimage":
        return reference.ssim(a, b)
    return _ssim(a, b, GAUSSIAN, covariance_scale=1.0)


def ssim_lab(a: Tensor, b: Tensor) -> Tensor:
    """Return SSIM as the paper's authors compute it later: 7 x 7 uniform window, sample covariance.

    Source: scikit-image's ``structural_similarity`` with its defaults. Sides of at least 7 pixels.
    """
    if _backend.get() == "skimage":
        return reference.ssim_lab(a, b)
    return _ssim(a, b, (1 / 7,) * 7, covariance_scale=49 / 48)


def ssim_for_loss(a: Tensor, b: Tensor) -> Tensor:
    """Return :func:`ssim` in float32, with finite gradients: accurate enough for training, not for results."""
    with torch.autocast(a.device.type, enabled=False):  # in bf16, rounding errors exceed the variances
        return _ssim_batch(a.float(), b.float(), GAUSSIAN, covariance_scale=1.0)


def ssim_invariant(a: Tensor, b: Tensor) -> Tensor:
    """Return the larger SSIM of ``a`` with ``b`` and with the negative of ``b``, which people can read as well."""
    return torch.maximum(ssim(a, b), ssim(a, 1 - b))


@lru_cache(maxsize=1)
def load_lpips() -> nn.Module | None:
    """Load LPIPS (Zhang, Isola, Efros, Shechtman, Wang 2018) with AlexNet from the package ``lpips``.

    Returns None if that package is not installed or torch's hub folder lacks AlexNet's weights; nothing is downloaded.
    """
    if not (Path(torch.hub.get_dir()) / "checkpoints" / ALEXNET).exists():  # first: the import takes seconds
        return None
    try:
        from lpips import LPIPS
    except ImportError:
        return None
    net: nn.Module = LPIPS(net="alex", version="0.1", verbose=False)
    return net.eval().requires_grad_(False)


def lpips_available(images: Tensor) -> bool:
    """Return whether :func:`lpips` can compare images (N, C, H, W); their sides need 32 pixels."""
    return min(images.shape[-2:]) >= LPIPS_MIN_SIDE and load_lpips() is not None


@torch.inference_mode()
def lpips(a: Tensor, b: Tensor) -> Tensor | None:
    """Return the perceptual distance of each pair, 0 for identical images; None if LPIPS is not available.

    It is also None for sides below 32 pixels. Gray images are repeated to RGB.
    """
    net = load_lpips()
    if net is None or not lpips_available(a):
        return None
    net.to(a.device)
    pairs = zip(a.split(LPIPS_BATCH), b.split(LPIPS_BATCH), strict=True)
    return torch.cat(
        [net(x.expand(-1, 3, -1, -1), y.expand(-1, 3, -1, -1), normalize=True).flatten() for x, y in pairs]
    )


@torch.inference_mode()
def lpips_features(images: Tensor) -> Tensor:
    """Return features float64 (N, D) whose squared distance is :func:`lpips`; see :func:`lpips_available`."""
    from lpips import normalize_tensor

    net: Any = load_lpips()
    assert net is not None
    net.to(images.device)
    batches = []
    for batch in images.split(LPIPS_BATCH):
        layers = net.net(net.scaling_layer(2 * batch.expand(-1, 3, -1, -1) - 1))
        features = []
        for layer, linear in zip(layers, net.lins, strict=True):
            weights = linear.model[-1].weight / layer.shape[2:].numel()  # not negative, as the paper requires
            features.append((normalize_tensor(layer) * weights.sqrt()).flatten(1))
        batches.append(torch.cat(features, dim=1).double())
    return torch.cat(batches)


def edge_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Return the correlation of the gradient magnitudes of each pair, in [-1, 1]; 0 if one image has no edge.

    Uses central differences of the luma. It ignores polarity and brightness, so it detects contours that PSNR and SSIM
    miss.
    """
    return (edge_maps(a) * edge_maps(b)).sum(1)


def edge_maps(images: Tensor) -> Tensor:
    """Return centered gradient magnitudes of norm 1, float64 (N, D); 0 without edges. Dot products are correlations."""
    magnitudes = _gradient_magnitudes(images)
    centered = magnitudes - magnitudes.mean(dim=1, keepdim=True)
    norm = centered.norm(dim=1, keepdim=True)
    return torch.where(norm > 1e-6, centered / norm.clamp_min(1e-6), torch.zeros_like(centered))


def _gradient_magnitudes(images: Tensor) -> Tensor:
    weights = (0.299, 0.587, 0.114) if images.shape[1] == 3 else (1 / images.shape[1],) * images.shape[1]
    luma = (images.double() * torch.tensor(weights, device=images.device).view(1, -1, 1, 1)).sum(1)
    dx = (luma[:, 1:-1, 2:] - luma[:, 1:-1, :-2]) / 2
    dy = (luma[:, 2:, 1:-1] - luma[:, :-2, 1:-1]) / 2
    return (dx.square() + dy.square()).sqrt().flatten(1)


def _ssim(a: Tensor, b: Tensor, window: tuple[float, ...], covariance_scale: float) -> Tensor:
    if len(a) == 0:
        return a.new_zeros(0, dtype=torch.float32)
    batch_size = max(1, SSIM_VALUES // max(1, a[:1].numel()))
    batches = zip(a.split(batch_size), b.split(batch_size), strict=True)
    return torch.cat([_ssim_batch(x.float(), y.float(), window, covariance_scale) for x, y in batches])


def _ssim_batch(a: Tensor, b: Tensor, window: tuple[float, ...], covariance_scale: float) -> Tensor:
    height, width = a.shape[-2:]
    rows = _window_matrix(window, height).to(a)
    columns = _window_matrix(window, width).to(a).t()
    # Variances are small differences of squares: on smooth bright images, float32 has errors of 3e-4. Centering each
    # image changes no variance and makes the squares small.
    center_a, center_b = a.mean(dim=(2, 3), keepdim=True), b.mean(dim=(2, 3), keepdim=True)
    a, b = a - center_a, b - center_b
    # Two matrix products apply the window at every position, many times faster than a convolution on a CPU.
    # Only the sum of both variances is needed.
    mean_a, mean_b, squares, product = rows @ torch.stack((a, b, a * a + b * b, a * b)) @ columns
    variances = covariance_scale * (squares - mean_a.square() - mean_b.square())
    covariance = covariance_scale * (product - mean_a * mean_b)
    mean_a, mean_b = mean_a + center_a, mean_b + center_b
    c1, c2 = 0.01**2, 0.03**2
    score = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    score = score / ((mean_a.square() + mean_b.square() + c1) * (variances + c2))
    averages: Tensor = score.mean(dim=(1, 2, 3)).float()
    return averages


@lru_cache(maxsize=16)
def _window_matrix(window: tuple[float, ...], side: int) -> Tensor:
    """Return a matrix (side - len(window) + 1, side) whose rows contain the window at each position in an image."""
    num_positions = side - len(window) + 1
    if num_positions < 1:
        raise ValueError(f"images must have sides of at least {len(window)} pixels, not {side}")
    matrix = torch.zeros(num_positions, side, dtype=torch.float64)
    for offset, weight in enumerate(window):
        matrix.diagonal(offset).fill_(weight)
    return matrix


def in_parts(values: Tensor, images: Tensor | None = None) -> tuple[Tensor, ...]:
    """Split ``values`` (N, ...) into parts of at most ``PART_VALUES`` values of ``images`` (N, ...)."""
    images = values if images is None else images
    parts: tuple[Tensor, ...] = values.split(max(1, PART_VALUES // max(1, images.shape[1:].numel())))
    return parts


def mean_image(images: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean uint8 (C, H, W) of images uint8 (N, C, H, W), or of those where ``mask`` bool (N,) is true."""
    mask = torch.ones(len(images), dtype=torch.bool, device=images.device) if mask is None else mask
    total = torch.zeros(images.shape[1:], dtype=torch.float64, device=images.device)
    for part, part_mask in zip(in_parts(images), in_parts(mask, images), strict=True):
        total += part[part_mask].sum(0, dtype=torch.float64)
    return (total / mask.sum()).round().to(torch.uint8)
