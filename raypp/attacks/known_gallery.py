"""T4: confirm which of a gallery's images a protected one is, by protecting them all.

Works on every protection that gives equal images for equal inputs, keyed or not, however well it hides them: whoever
owns the candidates needs no inversion. Only randomness per image withstands it, or one output for many images: of K
different protected images it tells at most K originals apart.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from raypp.attacks.base import Attack, Threat
from raypp.utils import registry

FINALISTS = 5


class KnownGalleryOptions(registry.MethodConfig):
    name: Literal["known_gallery"] = "known_gallery"
    batch_size: int = Field(500, ge=1)
    """Gallery images that are protected at a time."""


def _centred(values: Tensor) -> Tensor:
    return (values.float() - 128) / 128


class KnownGallery(Attack):
    """Gives the gallery image whose protected version is nearest."""

    Options: ClassVar[type[registry.MethodConfig]] = KnownGalleryOptions
    threat: ClassVar[Threat] = Threat.T4
    needs: ClassVar[tuple[str, ...]] = ("protect", "gallery")
    draws: ClassVar[bool] = False

    def prepare(self) -> None:
        assert self.access.protect is not None
        assert self.access.gallery is not None
        step = self.options.batch_size
        parts = self.access.gallery.split(step)
        self._protected = torch.cat([self.access.protect(part).flatten(1) for part in parts])
        self._lengths = _centred(self._protected).square().sum(1)
        self.note = f"{len(self._protected):,} candidates protected"

    def reconstruct(self, protected: Tensor) -> Tensor:
        assert self.access.gallery is not None
        found = []
        for part in protected.flatten(1).split(self.options.batch_size):
            distance = self._lengths - 2 * _centred(part) @ _centred(self._protected).t()
            # float32 cannot tell the very nearest apart; integers can.
            near = distance.topk(min(FINALISTS, len(self._lengths)), largest=False).indices
            exact = (self._protected[near].long() - part[:, None].long()).square().sum(2)
            found.append(near.gather(1, exact.argmin(1, keepdim=True)).flatten())
        return self.access.gallery[torch.cat(found).to(self.access.gallery.device)].to(protected.device)
