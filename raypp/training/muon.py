"""Muon: momentum whose matrices are made orthogonal before each step.

Source: Jordan et al. 2024 (kellerjordan.github.io/posts/muon), with the scale of Liu et al. 2025 (arXiv 2502.16982),
by which it takes learning rates of AdamW's size. torch.optim.Muon takes matrices only, and not convolutions' weights.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration, as published: singular values end in 0.7 to 1.2
ITERATIONS = 5
MATCH_RMS_ADAMW = 0.2  # of an update, as AdamW's are


class Muon(torch.optim.AdamW):
    """Muon for weights of two and more dimensions, each seen as a matrix of its outputs' rows, and AdamW for others.

    Args:
        groups: parameter groups, as for any optimiser of torch.
        lr: learning rate of both.
        momentum: of Muon's Nesterov momentum, and AdamW's first beta.
        weight_decay: decoupled, of both.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(groups, lr=lr, betas=(momentum, 0.999), weight_decay=weight_decay)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Take one step by the gradients at hand.

        Raises:
            ValueError: a closure is given: it would give new gradients to a step that is half done.
        """
        if closure is not None:
            raise ValueError("Muon takes no closure; compute the gradients before the step")
        for group in self.param_groups:
            alike: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.ndim > 1 and len(parameter) > 1:
                    alike[len(parameter), parameter[0].numel()].append(parameter)
            for (rows, columns), parameters in alike.items():
                momentum = group["betas"][0]
                averages = [self._average(parameter) for parameter in parameters]
                gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
                torch._foreach_lerp_(averages, gradients, 1 - momentum)
                ahead = torch._foreach_lerp(gradients, averages, momentum)
                updates = zeropower_via_newtonschulz(torch.stack([each.reshape(rows, columns) for each in ahead]))
                size = group["lr"] * MATCH_RMS_ADAMW * max(rows, columns) ** 0.5
                for parameter, update in zip(parameters, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.sub_(update.reshape(parameter.shape), alpha=size)
                    parameter.grad = None  # used up: AdamW passes over it
        return super().step()

    def _average(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "average" not in state:
            state["average"] = torch.zeros_like(parameter)
            state["step"] = torch.zeros(())  # AdamW asks for it when it loads a state
        average: Tensor = state["average"]
        return average


def zeropower_via_newtonschulz(matrices: Tensor) -> Tensor:
    """The nearest matrices with orthonormal rows or columns, roughly: singular values end in about 0.7 to 1.2.

    The published iteration, x <- (a + b x x' + c (x x')^2) x, taken on x x' alone: its factors are multiplied, and x
    only once. For matrices of many more columns than rows that is a third of the work, and float32 will do.

    Args:
        matrices: (N, rows, columns).
    """
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    a, b, c = COEFFICIENTS
    square = x @ x.mT
    unit = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    product = unit
    for left in reversed(range(ITERATIONS)):
        factor = a * unit + b * square + c * (square @ square)
        product = factor @ product
        if left:
            square = factor @ square @ factor
    found: Tensor = product @ x
    return found.mT if tall else found
