"""T5: search for the plain image of a protected one, by gradients through the protection.

Adam minimizes ``|h(x) - y|^2 + tv * TV(x) + prior * |x - x'|^2`` over x (Mahendran, Vedaldi 2015, for networks'
features). It starts from gray, from noise, and from the inverse network's estimate x'; without such an estimate the
last term is 0. Each image keeps the result with the lowest objective, which the attacker knows.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from raypp.attacks.base import Attack, Threat, required
from raypp.training.threads import AdaptiveThreads
from raypp.utils.images import to_uint8
from raypp.utils.registry import MethodConfig

MARGIN = 0.01  # distance of initial values from 0 and 1, whose logits are infinite


class WhiteBox(Attack):
    """Gradient descent on the plain image."""

    cost: ClassVar[str] = "`steps` forward and backward passes through the protection, for each start and image."

    class Options(MethodConfig):
        name: Literal["white_box"] = "white_box"
        steps: int = Field(400, ge=1)
        """Adam's steps per start."""
        lr: float = Field(0.05, gt=0)
        """Adam's learning rate on logits of pixels; falls linearly to a tenth."""
        tv: float = Field(0.002, ge=0)
        """Weight of the mean absolute difference of neighboring pixels."""
        prior: float = Field(0.1, ge=0)
        """Weight of the mean squared distance from the inverse network's estimate, which helps where the protection
        saturates and has no gradient."""
        restarts: int = Field(1, ge=0)
        """Random starts, in addition to gray and the inverse network's estimate."""
        num_images: int = Field(200, ge=1)
        """Most images to attack; each takes steps times starts passes through the protection."""
        batch_size: int = Field(100, ge=1)

    threat: ClassVar[Threat] = Threat.T5
    needs: ClassVar[tuple[str, ...]] = ("gradients",)
    after: ClassVar[tuple[str, ...]] = ("inverse",)
    effort = "steps"
    max_validation: ClassVar[int] = 25

    def prepare(self) -> None:
        self.max_queries = self.options.num_images
        prior = ["the inverse network's estimate"] if "inverse" in (self.access.earlier or {}) else []
        starts = ["gray", *prior, *["noise"] * self.options.restarts]
        self.note = f"{self.options.steps} steps from each of {', '.join(starts)}"

    def reconstruct(self, protected: Tensor) -> Tensor:
        batches = protected.to(self.access.device).split(self.options.batch_size)
        return to_uint8(torch.cat([self._attack(batch) for batch in batches]))

    def _attack(self, protected: Tensor) -> Tensor:
        target = protected.float() / 255
        shape, device = (len(protected), *self.access.shape), target.device
        inverse = (self.access.earlier or {}).get("inverse")
        prior = inverse(protected).float() / 255 if inverse is not None else None
        generator = torch.Generator().manual_seed(self.seed)
        noise = [torch.rand(shape, generator=generator).to(device) for _ in range(self.options.restarts)]
        lowest = torch.full((len(protected),), float("inf"), device=device)
        best = torch.zeros(shape, device=device)
        for start in (torch.full(shape, 0.5, device=device), *([] if prior is None else [prior]), *noise):
            estimate, objective = self._descend(start, target, prior)
            better = objective < lowest
            lowest = torch.where(better, objective, lowest)
            best = torch.where(better[:, None, None, None], estimate, best)
        return best

    def _descend(self, start: Tensor, target: Tensor, prior: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return estimates (n, C, H, W) in [0, 1] and their objectives (n,)."""
        options = self.options
        logits = torch.logit(start.clamp(MARGIN, 1 - MARGIN)).requires_grad_()
        optimizer = torch.optim.Adam([logits], lr=options.lr)
        with AdaptiveThreads(start.device.type == "cpu") as threads:
            for step in range(options.steps):
                optimizer.param_groups[0]["lr"] = options.lr * (1 - 0.9 * step / options.steps)
                optimizer.zero_grad()
                with torch.enable_grad():
                    self._objective(torch.sigmoid(logits), target, prior).sum().backward()
                optimizer.step()
                threads.update()
        with torch.no_grad():
            estimate = torch.sigmoid(logits)
            return estimate, self._objective(estimate, target, prior)

    def _objective(self, images: Tensor, target: Tensor, prior: Tensor | None) -> Tensor:
        error = (required(self.access.gradients)(images) - target).square().mean(dim=(1, 2, 3))
        horizontal = (images[..., 1:] - images[..., :-1]).abs().mean(dim=(1, 2, 3))
        vertical = (images[..., 1:, :] - images[..., :-1, :]).abs().mean(dim=(1, 2, 3))
        objective: Tensor = error + self.options.tv * (horizontal + vertical)
        if prior is not None:
            objective = objective + self.options.prior * (images - prior).square().mean(dim=(1, 2, 3))
        return objective
