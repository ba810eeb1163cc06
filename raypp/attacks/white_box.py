"""T5: search for the plain image of a protected one, by gradients through the protection.

Adam minimizes ``misfit + tv * TV(x)`` over x (Mahendran, Vedaldi 2015, for networks' features). A protection that ends
with a sigmoid has logits L(x). Its misfit is the mean distance of each logit to the interval that rounds to the
observed byte y: from logit((y - 0.5) / 255) to logit((y + 0.5) / 255), without bound at 0 and 255. This is regularized
maximum likelihood (He, Zhang, Lee 2019) for a rounded sigmoid, whose saturated values keep a gradient. The misfit of
other protections is ``|h(x) - y / 255|^2``.

The descents start from gray, from noise, and from the inverse network's estimate x', where ``prior * |x - x'|^2`` is
added. Each image keeps the result with the lowest ``misfit + tv * TV(x)``, which the attacker knows.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from raypp.attacks.base import Attack, Threat, required
from raypp.attacks.misfit import checked_logits, interval_misfit
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
        tv: float | None = Field(None, ge=0)
        """Weight of the mean absolute difference of neighboring pixels; null for 0.02 with logits, else 0.002."""
        prior: float | None = Field(None, ge=0)
        """Weight of the mean squared distance from the inverse network's estimate, in the descent that starts there;
        null for 1 with logits, else 0.1."""
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
        self._logits = checked_logits(self.access, self.seed)
        default_tv, default_prior = (0.002, 0.1) if self._logits is None else (0.02, 1.0)
        self._tv = default_tv if self.options.tv is None else self.options.tv
        self._prior = default_prior if self.options.prior is None else self.options.prior
        inverse = ["the inverse network's estimate"] if "inverse" in (self.access.earlier or {}) else []
        starts = ["gray", *inverse, *["noise"] * self.options.restarts]
        self._num_starts = len(starts)
        compared = "outputs" if self._logits is None else "logits"
        self.note = f"{self.options.steps} steps on {compared} from each of {', '.join(starts)}"

    def reconstruct(self, protected: Tensor) -> Tensor:
        batches = protected.to(self.access.device).split(self.options.batch_size)
        self._counter = self.count_steps("descent", len(batches) * self._num_starts * self.options.steps)
        return to_uint8(torch.cat([self._attack(batch) for batch in batches]))

    def _attack(self, protected: Tensor) -> Tensor:
        shape, device = (len(protected), *self.access.shape), protected.device
        inverse = (self.access.earlier or {}).get("inverse")
        generator = torch.Generator().manual_seed(self.seed)
        starts: list[tuple[Tensor, float]] = [(torch.full(shape, 0.5, device=device), 0.0)]
        if inverse is not None:
            starts.append((inverse(protected).float() / 255, self._prior))
        starts += [(torch.rand(shape, generator=generator).to(device), 0.0) for _ in range(self.options.restarts)]
        lowest = torch.full((len(protected),), float("inf"), device=device)
        best = torch.zeros(shape, device=device)
        for start, prior in starts:
            estimate = self._descend(start, protected, prior)
            with torch.no_grad():
                objective = self._objective(estimate, protected)
            better = objective < lowest
            lowest = torch.where(better, objective, lowest)
            best = torch.where(better[:, None, None, None], estimate, best)
        return best

    def _descend(self, start: Tensor, protected: Tensor, prior: float) -> Tensor:
        """Return estimates (n, C, H, W) in [0, 1]; ``prior`` weighs their squared distance from ``start``."""
        options = self.options
        logits = torch.logit(start.clamp(MARGIN, 1 - MARGIN)).requires_grad_()
        optimizer = torch.optim.Adam([logits], lr=options.lr)
        with AdaptiveThreads(start.device.type == "cpu") as threads:
            for step in range(options.steps):
                optimizer.param_groups[0]["lr"] = options.lr * (1 - 0.9 * step / options.steps)
                optimizer.zero_grad()
                with torch.enable_grad():
                    images = torch.sigmoid(logits)
                    objective = self._objective(images, protected)
                    if prior:
                        objective = objective + prior * (images - start).square().mean(dim=(1, 2, 3))
                    objective.sum().backward()
                optimizer.step()
                threads.update()
                self._counter.advance()
        return torch.sigmoid(logits.detach())

    def _objective(self, images: Tensor, protected: Tensor) -> Tensor:
        """Return ``misfit + tv * TV`` (n,) of images in [0, 1] to protected images uint8."""
        horizontal = (images[..., 1:] - images[..., :-1]).abs().mean(dim=(1, 2, 3))
        vertical = (images[..., 1:, :] - images[..., :-1, :]).abs().mean(dim=(1, 2, 3))
        objective: Tensor = self._misfit(images, protected) + self._tv * (horizontal + vertical)
        return objective

    def _misfit(self, images: Tensor, protected: Tensor) -> Tensor:
        if self._logits is not None:
            return interval_misfit(self._logits(images), protected)
        return (required(self.access.gradients)(images) - protected.float() / 255).square().mean(dim=(1, 2, 3))
