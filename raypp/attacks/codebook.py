"""T4: a picture for each of the few protected images that there are, made of the originals that share it.

Where a protection gives few different images (``learned`` with a code, or a map that sends a class), whoever can
protect images of his own needs no network: of everything that can be drawn from a protected image, the mean of the
originals that give it has the least squared error, and a picture fitted to them the highest SSIM. What this attack
finds is what a converged inverse network would.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from raypp.attacks.base import Attack, AttackError, Threat
from raypp.attacks.inverse_network import reconstruction_loss
from raypp.utils import registry
from raypp.utils.images import to_uint8


class CodebookOptions(registry.MethodConfig):
    name: Literal["codebook"] = "codebook"
    most: int = Field(4096, ge=1)
    """Different protected images at most: with more, an inverse network is the attack to take."""
    steps: int = Field(400, ge=0)
    """Adam's steps from the mean images towards a higher SSIM; 0 leaves the means."""
    lr: float = Field(0.02, gt=0)
    """Adam's learning rate on values in [0, 1]; falls linearly to 0."""
    loss: Literal["l1", "mse"] = "l1"
    ssim_weight: float = Field(1.0, ge=0)
    """Weight of ``1 - SSIM`` beside it, as in the inverse network's loss."""
    batch_size: int = Field(500, ge=1)
    """Images that are protected, or fitted to, at a time."""


class Codebook(Attack):
    """Tabulates the protection; gives a protected image that is not in the table the picture of the nearest one."""

    Options: ClassVar[type[registry.MethodConfig]] = CodebookOptions
    threat: ClassVar[Threat] = Threat.T4
    needs: ClassVar[tuple[str, ...]] = ("protect", "images")

    def prepare(self) -> None:
        assert self.access.images is not None
        images = self.access.images
        entries, members = self._tabulate(images)
        num = len(entries)
        self._entries = torch.stack(entries)
        counts = torch.bincount(members, minlength=num)
        sums = torch.zeros(num, *images.shape[1:])
        size = self.options.batch_size
        for part, at in zip(images.split(size), members.split(size), strict=True):
            sums.index_add_(0, at, part.float().cpu() / 255)
        means = sums / counts.view(-1, 1, 1, 1)
        self._pictures = to_uint8(self._fitted(means.to(self.access.device), images, members))
        self.note = (
            f"{num:,} different protected images of {len(images):,}, the commonest of {int(counts.max()):,} of them; "
            f"{self.options.steps} steps"
        )

    def reconstruct(self, protected: Tensor) -> Tensor:
        known = self._entries.flatten(1).float()
        nearest = [
            torch.cdist(part.flatten(1).float().cpu(), known).argmin(1)
            for part in protected.split(self.options.batch_size)
        ]
        return self._pictures[torch.cat(nearest).to(self._pictures.device)].to(protected.device)

    def _tabulate(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """The different protected images, in order of appearance, and which of them each image (N,) becomes."""
        assert self.access.protect is not None
        entries: list[Tensor] = []
        numbers: dict[bytes, int] = {}
        members: list[int] = []
        for part in images.split(self.options.batch_size):
            for protected in self.access.protect(part).cpu():
                number = numbers.setdefault(protected.numpy().tobytes(), len(numbers))
                if number == len(entries):
                    entries.append(protected)
                members.append(number)
            if len(entries) > self.options.most:
                raise AttackError(
                    f"attack codebook is for protections that give few different images; this one gave "
                    f"{len(entries):,} of {len(members):,}, more than most = {self.options.most:,}"
                )
        return entries, torch.tensor(members)

    def _fitted(self, pictures: Tensor, images: Tensor, members: Tensor) -> Tensor:
        """Pictures (K, C, H, W) in [0, 1] brought nearer to the images (N, C, H, W) that share each."""
        options = self.options
        random = torch.Generator().manual_seed(self.seed)
        pictures = pictures.clone().requires_grad_()
        optimizer = torch.optim.Adam([pictures], lr=options.lr)
        for step in range(options.steps):
            optimizer.param_groups[0]["lr"] = options.lr * (1 - step / options.steps)
            chosen = torch.randint(len(images), (options.batch_size,), generator=random)
            target = images[chosen.to(images.device)].to(pictures.device).float() / 255
            with torch.enable_grad():
                estimates = pictures[members[chosen].to(pictures.device)]
                optimizer.zero_grad()
                reconstruction_loss(estimates, target, options).loss.backward()
            optimizer.step()
            with torch.no_grad():
                pictures.clamp_(0, 1)
        return pictures.detach()
