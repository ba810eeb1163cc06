"""Muon: SGD with momentum whose update matrices are orthogonalized.

Source: Jordan et al. 2024 (kellerjordan.github.io/posts/muon). The update's scale is that of Liu et al. 2025
(arXiv 2502.16982), so that learning rates of AdamW fit. ``torch.optim.Muon`` does not take convolutions' weights.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic Newton-Schulz iteration, as published
ITERATIONS = 5
MATCH_RMS_ADAMW = 0.2  # root mean square of an update, as AdamW's


class Muon(torch.optim.AdamW):
    """Muon for weights of two and more dimensions, flattened to one row per output, and AdamW for all others.

    Both have the same learning rate and decoupled weight decay. ``momentum`` is Muon's Nesterov momentum, and AdamW's
    first beta.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(groups, lr=lr, betas=(momentum, 0.999), weight_decay=weight_decay)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Take one step with the current gradients; raises ValueError for a closure."""
        if closure is not None:
            raise ValueError("Muon takes no closure; compute the gradients before the step")
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.ndim > 1 and len(parameter) > 1:
                    by_shape[len(parameter), parameter[0].numel()].append(parameter)
            momenta = [self._nesterov(group, shape, parameters) for shape, parameters in by_shape.items()]
            for parameters, updates in zip(by_shape.values(), zeropower_via_newtonschulz(momenta), strict=True):
                self._update(group, parameters, updates)
        return super().step()

    def _nesterov(self, group: dict[str, Any], shape: tuple[int, int], parameters: list[Tensor]) -> Tensor:
        """Update the averages of gradients; returns Nesterov's look-ahead of them, (number of parameters, *shape)."""
        for parameter in parameters:
            if not self.state[parameter]:  # AdamW needs the step to load a state
                self.state[parameter] = {"average": torch.zeros_like(parameter), "step": torch.zeros(())}
        averages = [self.state[parameter]["average"] for parameter in parameters]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        momentum = group["betas"][0]
        torch._foreach_lerp_(averages, gradients, 1 - momentum)
        nesterov = torch._foreach_lerp(gradients, averages, momentum)
        return torch.stack([each.reshape(shape) for each in nesterov])

    @staticmethod
    def _update(group: dict[str, Any], parameters: list[Tensor], updates: Tensor) -> None:
        """Apply orthogonalized updates, and clear the gradients so that AdamW skips these parameters."""
        scale = group["lr"] * MATCH_RMS_ADAMW * max(updates.shape[1:]) ** 0.5
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        shaped = [update.reshape(parameter.shape) for parameter, update in zip(parameters, updates, strict=True)]
        torch._foreach_add_(parameters, shaped, alpha=-scale)
        for parameter in parameters:
            parameter.grad = None


def zeropower_via_newtonschulz(batches: Sequence[Tensor]) -> list[Tensor]:
    """Approximate the nearest matrices with orthonormal rows or columns; singular values end in about 0.7 to 1.2.

    The published iteration is x <- (a + b x x' + c (x x')^2) x. This one multiplies the factors, which depend on x x'
    alone, and applies them to x once. For matrices with many more columns than rows that is a third of the work.
    Batches with the same smaller side share the iteration, whatever their larger side is.

    Args:
        batches: each (N, rows, columns).
    """
    wide = [batch if batch.shape[1] <= batch.shape[2] else batch.mT for batch in batches]
    wide = [x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7) for x in wide]
    by_side: dict[int, list[int]] = defaultdict(list)
    for index, x in enumerate(wide):
        by_side[x.shape[1]].append(index)
    for indices in by_side.values():
        products = _newtonschulz_product(torch.cat([wide[i] @ wide[i].mT for i in indices]))
        for i, product in zip(indices, products.split([len(wide[i]) for i in indices]), strict=True):
            wide[i] = product @ wide[i]
    return [x if x.shape == batch.shape else x.mT for x, batch in zip(wide, batches, strict=True)]


def _newtonschulz_product(square: Tensor) -> Tensor:
    """The product of the iteration's factors, from x x' (N, side, side)."""
    a, b, c = COEFFICIENTS
    identity = torch.eye(square.shape[1], dtype=square.dtype, device=square.device)
    product = identity
    for left in reversed(range(ITERATIONS)):
        factor = a * identity + b * square + c * (square @ square)
        product = factor @ product
        if left:
            square = factor @ square @ factor
    return product
