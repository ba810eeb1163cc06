"""The misfit of white-box attacks: the distance of a protection's logits to the intervals of the observed bytes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from raypp.attacks.base import AttackerKnowledge, ImageMap, required

TOLERANCE = 1e-4  # of the comparison of a protection with the sigmoid of its logits


@torch.no_grad()
def checked_logits(access: AttackerKnowledge, seed: int) -> ImageMap | None:
    """Return the logits that the target states, if their sigmoid is its output on random images; else None."""
    if access.logits is None:
        return None
    images = torch.rand((2, *access.shape), generator=torch.Generator().manual_seed(seed)).to(access.device)
    outputs, logits = required(access.gradients)(images), access.logits(images)
    is_sigmoid = logits.shape == outputs.shape and torch.allclose(torch.sigmoid(logits), outputs, atol=TOLERANCE)
    return access.logits if is_sigmoid else None


def interval_misfit(logits: Tensor, protected: Tensor) -> Tensor:
    """Mean distances (n,) of logits to the intervals whose sigmoids round to the observed bytes.

    Saturated values keep a gradient. Bytes 0 and 255 have no outer bound.

    Args:
        logits: of the protection, float (n, C, H, W).
        protected: observed, uint8 of the same shape.
    """
    observed = protected.float()
    low = torch.where(protected == 0, -torch.inf, torch.logit((observed - 0.5) / 255))
    high = torch.where(protected == 255, torch.inf, torch.logit((observed + 0.5) / 255))
    return (F.relu(low - logits) + F.relu(logits - high)).mean(dim=(1, 2, 3))
