"""T4: identify a protected image in a gallery by protecting the whole gallery.

It works on every deterministic protection, with or without a key, and needs no inversion. Only randomness per image,
or one output for many images, resists it: K different protected images distinguish at most K originals.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from raypp.attacks.base import Attack, Threat, required
from raypp.utils.registry import MethodConfig

FINALISTS = 5


class KnownGallery(Attack):
    """Returns the gallery image whose protected version is nearest."""

    cost: ClassVar[str] = "Protects the whole gallery once; it trains nothing."

    class Options(MethodConfig):
        name: Literal["known_gallery"] = "known_gallery"
        batch_size: int = Field(500, ge=1)
        """Gallery images per batch."""

    threat: ClassVar[Threat] = Threat.T4
    needs: ClassVar[tuple[str, ...]] = ("protect", "gallery")
    draws: ClassVar[bool] = False
    matcher: ClassVar[str] = "pixels"  # its estimates are images of the gallery

    def prepare(self) -> None:
        batches = required(self.access.gallery).split(self.options.batch_size)
        protect = required(self.access.protect)
        self._protected = torch.cat([protect(batch).flatten(1) for batch in batches])
        self._squared_norms = _center(self._protected).square().sum(1)
        self.note = f"{len(self._protected):,} candidates protected"

    def reconstruct(self, protected: Tensor) -> Tensor:
        nearest = []
        for batch in protected.flatten(1).split(self.options.batch_size):
            distance = self._squared_norms - 2 * _center(batch) @ _center(self._protected).t()
            # float32 cannot rank the very nearest; integers can.
            candidates = distance.topk(min(FINALISTS, len(self._squared_norms)), largest=False).indices
            exact = (self._protected[candidates].long() - batch[:, None].long()).square().sum(2)
            nearest.append(candidates.gather(1, exact.argmin(1, keepdim=True)).flatten())
        gallery = required(self.access.gallery)
        return gallery[torch.cat(nearest).to(gallery.device)].to(protected.device)


def _center(values: Tensor) -> Tensor:
    return (values.float() - 128) / 128
