"""The misfit of white-box attacks: the distance of a protection's logits to the intervals of the observed bytes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from raypp.attacks.base import AttackerKnowledge, ImageMap, required

TOLERANCE = 1e-4  # of the comparison of a protection with the sigmoid of its logits


@torch.enable_grad()
def checked_logits(access: AttackerKnowledge, seed: int) -> ImageMap | None:
    """Return the logits that the target states, or None if random images show that they are something else.

    They must be a differentiable float tensor of the outputs' shape, and the outputs must be their sigmoid.
    """
    if access.logits is None:
        return None
    images = torch.rand((2, *access.shape), generator=torch.Generator().manual_seed(seed)).to(access.device)
    images.requires_grad_()
    outputs = required(access.gradients)(images)
    try:
        logits = access.logits(images)
    except Exception:  # a user's method of this name may take other arguments
        return None
    is_float = isinstance(logits, Tensor) and logits.is_floating_point() and logits.requires_grad
    if not is_float or logits.shape != outputs.shape:
        return None
    is_sigmoid = torch.allclose(torch.sigmoid(logits).to(outputs), outputs, atol=TOLERANCE)
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
