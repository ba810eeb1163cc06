"""Networks and their weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from raypp.models.vgg import RELU2_2, VGG16_LAYERS, vgg_features


def same(a: Any, b: Any) -> bool:
    """Whether two trees of containers, numbers and tensors are equal to the last bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k not in {"seconds", "images_per_s"})
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def vgg_slice() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return vgg_features(VGG16_LAYERS[:RELU2_2], 3, batch_norm=False).state_dict()
