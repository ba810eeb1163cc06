"""The paper's loss, Eq. 4 to 6 of Ito, Kinoshita, Kiya 2020."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Eq. 5: cross-entropy of logits N x K with integer labels N, mean over the batch."""
    return F.cross_entropy(logits.float(), labels)


def feature_distance(protected: Tensor, plain: Tensor) -> Tensor:
    """Eq. 6: squared distance of two feature maps N x C x H x W over C*H*W, mean over the batch."""
    return F.mse_loss(protected.float(), plain.float())


def transformation_loss(classification: Tensor, distance: Tensor, alpha: float) -> Tensor:
    """Eq. 4: the loss of the protection h_theta; a larger ``alpha`` moves protected images further from plain ones."""
    return classification - alpha * distance
