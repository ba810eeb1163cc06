"""Muon: SGD with momentum whose update matrices are orthogonalized.

Source: Jordan et al. 2024 (kellerjordan.github.io/posts/muon). The update's scale is that of Liu et al. 2025
(arXiv 2502.16982), so that learning rates of AdamW fit. ``torch.optim.Muon`` does not take convolutions' weights.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
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
            for (rows, columns), parameters in by_shape.items():
                self._muon_step(group, rows, columns, parameters)
        return super().step()

    def _muon_step(self, group: dict[str, Any], rows: int, columns: int, parameters: list[Tensor]) -> None:
        """Update parameters of one matrix shape, and clear their gradients so that AdamW skips them."""
        for parameter in parameters:
            if not self.state[parameter]:  # AdamW needs the step to load a state
                self.state[parameter] = {"average": torch.zeros_like(parameter), "step": torch.zeros(())}
        averages = [self.state[parameter]["average"] for parameter in parameters]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        momentum, lr = group["betas"][0], group["lr"]
        torch._foreach_lerp_(averages, gradients, 1 - momentum)
        nesterov = torch._foreach_lerp(gradients, averages, momentum)
        updates = zeropower_via_newtonschulz(torch.stack([each.reshape(rows, columns) for each in nesterov]))
        scale = lr * MATCH_RMS_ADAMW * max(rows, columns) ** 0.5
        for parameter, update in zip(parameters, updates, strict=True):
            parameter.mul_(1 - lr * group["weight_decay"])
            parameter.sub_(update.reshape(parameter.shape), alpha=scale)
            parameter.grad = None


def zeropower_via_newtonschulz(matrices: Tensor) -> Tensor:
    """Approximate the nearest matrices with orthonormal rows or columns; singular values end in about 0.7 to 1.2.

    The published iteration is x <- (a + b x x' + c (x x')^2) x. This one multiplies the factors, which depend on x x'
    alone, and applies them to x once. For matrices with many more columns than rows that is a third of the work.

    Args:
        matrices: (N, rows, columns).
    """
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    a, b, c = COEFFICIENTS
    square = x @ x.mT
    identity = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    product = identity
    for left in reversed(range(ITERATIONS)):
        factor = a * identity + b * square + c * (square @ square)
        product = factor @ product
        if left:
            square = factor @ square @ factor
    result: Tensor = product @ x
    return result.mT if tall else result
