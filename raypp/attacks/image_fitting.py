"""Fit one image to each group of images by gradient, such as the image that is most similar to a class by SSIM."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]
"""Mean loss of estimates and images, both float (n, C, H, W) in [0, 1]."""


def fit_images(
    start: Tensor, images: Tensor, members: Tensor, loss: Loss, *, steps: int, lr: float, batch_size: int, seed: int
) -> Tensor:
    """Minimize the mean loss between the image of each group and the group's members, by Adam on random batches.

    Args:
        start: initial images float (K, C, H, W) in [0, 1], one for each group.
        images: uint8 (N, C, H, W).
        members: group of each image, int64 (N,), in [0, K).
        loss: mean loss of a batch.
        steps: number of steps; 0 returns ``start``.
        lr: learning rate on values in [0, 1]; falls linearly to 0.
        batch_size: images per step.
        seed: seed of the batches.

    Returns:
        the fitted images float (K, C, H, W) in [0, 1].
    """
    generator = torch.Generator().manual_seed(seed)
    fitted = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([fitted], lr=lr)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        batch = torch.randint(len(images), (batch_size,), generator=generator)
        target = images[batch.to(images.device)].to(fitted.device).float() / 255
        with torch.enable_grad():
            optimizer.zero_grad()
            loss(fitted[members[batch.to(members.device)].to(fitted.device)], target).backward()
        optimizer.step()
        with torch.no_grad():
            fitted.clamp_(0, 1)
    return fitted.detach()
