"""T5: look for the plain image whose protected version is the one at hand, by gradients through the protection.

Minimises ``|h(x) - y|^2 + tv * TV(x) + prior * |x - x'|^2`` over x by Adam (Mahendran, Vedaldi 2015, for networks'
features), from grey, from noise, and from the inverse network's estimate x' where there is one (else without the last
term); of all starts each image keeps the one that the objective likes best, which an attacker can tell.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from raypp.attacks.base import Attack, Threat
from raypp.training.threads import AdaptiveThreads
from raypp.utils import registry
from raypp.utils.images import to_uint8

MARGIN = 0.01  # of the range at which values saturate: an exact 0 or 1 has no finite logit


class WhiteBoxOptions(registry.MethodConfig):
    name: Literal["white_box"] = "white_box"
    steps: int = Field(400, ge=1)
    """Adam's steps from each start."""
    lr: float = Field(0.05, gt=0)
    """Adam's learning rate on logits of pixels; falls linearly to a tenth."""
    tv: float = Field(0.002, ge=0)
    """Weight of the mean absolute difference of neighbouring pixels."""
    prior: float = Field(0.1, ge=0)
    """Weight of the mean squared distance from the inverse network's estimate, where there is one: what saturates in
    the protection has no gradient, and there the network knows better."""
    restarts: int = Field(1, ge=0)
    """Random starts, besides grey and the inverse network's estimate."""
    num_images: int = Field(200, ge=1)
    """How many images to attack at most: each costs steps times starts passes through the protection."""
    batch_size: int = Field(100, ge=1)


class WhiteBox(Attack):
    """Gradient descent on the image itself."""

    Options: ClassVar[type[registry.MethodConfig]] = WhiteBoxOptions
    threat: ClassVar[Threat] = Threat.T5
    needs: ClassVar[tuple[str, ...]] = ("gradients",)
    after: ClassVar[tuple[str, ...]] = ("inverse",)
    effort = "steps"

    def __init__(self, options: Any, access: Any, *, seed: int = 0, learned: bool = False) -> None:
        super().__init__(options, access, seed=seed, learned=learned)
        self.max_queries = options.num_images

    def prepare(self) -> None:
        warm = "inverse" in (self.access.earlier or {})
        starts = ["grey", *(["the inverse network's estimate"] if warm else []), *["noise"] * self.options.restarts]
        self.note = f"{self.options.steps} steps from each of {', '.join(starts)}"

    def reconstruct(self, protected: Tensor) -> Tensor:
        found = torch.cat(
            [self._attack(part) for part in protected.to(self.access.device).split(self.options.batch_size)]
        )
        return to_uint8(found)

    def _attack(self, protected: Tensor) -> Tensor:
        target = protected.float() / 255
        num = len(protected)
        warm = (self.access.earlier or {}).get("inverse")
        likely = warm(protected).float() / 255 if warm is not None else None
        best = torch.full((num,), float("inf"), device=target.device)
        kept = torch.zeros(num, *self.access.shape, device=target.device)
        for start in self._starts(num, likely):
            estimate, cost = self._descend(start, target, likely)
            better = cost < best
            best = torch.where(better, cost, best)
            kept = torch.where(better[:, None, None, None], estimate, kept)
        return kept

    def _starts(self, num: int, likely: Tensor | None) -> list[Tensor]:
        shape = (num, *self.access.shape)
        device = self.access.device
        starts = [torch.full(shape, 0.5, device=device)]
        if likely is not None:
            starts.append(likely)
        random = torch.Generator().manual_seed(self.seed)
        starts += [torch.rand(shape, generator=random).to(device) for _ in range(self.options.restarts)]
        return starts

    def _descend(self, start: Tensor, target: Tensor, likely: Tensor | None) -> tuple[Tensor, Tensor]:
        """Estimates (n, C, H, W) in [0, 1] and their objectives (n,)."""
        assert self.access.gradients is not None
        options = self.options
        logits = torch.logit(start.clamp(MARGIN, 1 - MARGIN)).requires_grad_()
        optimizer = torch.optim.Adam([logits], lr=options.lr)
        with AdaptiveThreads(start.device.type == "cpu") as threads:
            for step in range(options.steps):
                optimizer.param_groups[0]["lr"] = options.lr * (1 - 0.9 * step / options.steps)
                optimizer.zero_grad()
                with torch.enable_grad():
                    self._objective(torch.sigmoid(logits), target, likely).sum().backward()
                optimizer.step()
                threads.update()
        with torch.no_grad():
            estimate = torch.sigmoid(logits)
            return estimate, self._objective(estimate, target, likely)

    def _objective(self, images: Tensor, target: Tensor, likely: Tensor | None) -> Tensor:
        assert self.access.gradients is not None
        error = (self.access.gradients(images) - target).square().mean(dim=(1, 2, 3))
        across = (images[..., 1:] - images[..., :-1]).abs().mean(dim=(1, 2, 3))
        down = (images[..., 1:, :] - images[..., :-1, :]).abs().mean(dim=(1, 2, 3))
        objective: Tensor = error + self.options.tv * (across + down)
        if likely is not None:
            objective = objective + self.options.prior * (images - likely).square().mean(dim=(1, 2, 3))
        return objective
