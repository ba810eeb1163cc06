"""T4: tabulate the few different protected images, with a reconstruction of each from the originals that share it.

This attack is for protections with few different outputs, such as ``learned`` with a code. Of all reconstructions of
a protected image, the mean of its originals has the least squared error, and an image fitted to them the highest SSIM.
A converged inverse network gives the same result.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from raypp.attacks.base import (
    MAX_VAL,
    Attack,
    AttackError,
    Threat,
    count_validation_images,
    required,
    shuffle_indices,
)
from raypp.attacks.image_fitting import fit_images
from raypp.attacks.inverse_network import reconstruction_loss
from raypp.utils.images import to_uint8
from raypp.utils.registry import MethodConfig


class Codebook(Attack):
    """Tabulates the protection; a protected image outside the table gets the reconstruction of the nearest entry.

    The validation images, which select the matcher, are not tabulated.
    """

    cost: ClassVar[str] = "Protects all of the attacker's images, then fits one image per entry; it trains nothing."

    class Options(MethodConfig):
        name: Literal["codebook"] = "codebook"
        most: int = Field(4096, ge=1)
        """Largest number of different protected images; use an inverse network for more."""
        steps: int = Field(400, ge=0)
        """Adam's steps from the mean images towards a higher SSIM; 0 leaves the means."""
        lr: float = Field(0.02, gt=0)
        """Adam's learning rate on values in [0, 1]; falls linearly to 0."""
        loss: Literal["l1", "mse"] = "l1"
        ssim_weight: float = Field(1.0, ge=0)
        """Weight of ``1 - SSIM`` in the loss, as for the inverse network."""
        batch_size: int = Field(500, ge=1)
        """Images per batch, for protecting and for fitting."""

    threat: ClassVar[Threat] = Threat.T4
    needs: ClassVar[tuple[str, ...]] = ("protect", "images")
    max_validation: ClassVar[int] = MAX_VAL

    def prepare(self) -> None:
        images = required(self.access.images)
        order = shuffle_indices(len(images), self.seed).to(images.device)
        images = images[order[count_validation_images(len(images)) :].sort().values]
        entries, members = self._tabulate(images)
        num = len(entries)
        self._entries = torch.stack(entries)
        counts = torch.bincount(members, minlength=num)
        sums = torch.zeros(num, *images.shape[1:])
        size = self.options.batch_size
        for batch, indices in zip(images.split(size), members.split(size), strict=True):
            sums.index_add_(0, indices, batch.float().cpu() / 255)
        means = sums / counts.view(-1, 1, 1, 1)
        options = self.options
        fitted = fit_images(
            means.to(self.access.device), images, members,
            lambda estimates, originals: reconstruction_loss(estimates, originals, options).loss,
            steps=options.steps, lr=options.lr, batch_size=options.batch_size, seed=self.seed,
        )  # fmt: skip
        self._reconstructions = to_uint8(fitted)
        self.note = (
            f"{num:,} different protected images of {len(images):,}, the commonest of {int(counts.max()):,} of them; "
            f"{self.options.steps} steps"
        )

    def reconstruct(self, protected: Tensor) -> Tensor:
        entries = self._entries.flatten(1).float()
        nearest = [
            torch.cdist(batch.flatten(1).float().cpu(), entries).argmin(1)
            for batch in protected.split(self.options.batch_size)
        ]
        return self._reconstructions[torch.cat(nearest).to(self._reconstructions.device)].to(protected.device)

    def _tabulate(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the different protected images, in order of appearance, and each image's entry (N,)."""
        protect = required(self.access.protect)
        entries: list[Tensor] = []
        numbers: dict[bytes, int] = {}
        members: list[int] = []
        for batch in images.split(self.options.batch_size):
            for protected in protect(batch).cpu():
                number = numbers.setdefault(protected.numpy().tobytes(), len(numbers))
                if number == len(entries):
                    entries.append(protected)
                members.append(number)
            if len(entries) > self.options.most:
                raise AttackError(
                    f"attack codebook needs a protection with few different images; this one gave "
                    f"{len(entries):,} of {len(members):,}, more than most = {self.options.most:,}"
                )
        return entries, torch.tensor(members)
