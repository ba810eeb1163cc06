"""Pixel-based encryption (PE): each value of each pixel inverted or not, and each pixel's colours permuted.

Sources: Sirichotedumrong, Maekawa, Kinoshita, Kiya, ICIP 2019 (one key for all images); Sirichotedumrong, Kinoshita,
Kiya, IEEE Access 2019 (a key per image that nobody keeps, "without key management"). ``parity`` draws the inversions as
the authors' public code does, from NumPy's RandomState.
"""

from __future__ import annotations

from itertools import permutations
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from raypp.protections.base import require_key
from raypp.protections.cipher import Cipher, KeyedOptions, Table
from raypp.utils import registry
from raypp.utils.keys import Key

ORDERS = np.array(list(permutations(range(3))))


class PixelOptions(KeyedOptions):
    name: Literal["pixel"] = "pixel"
    keys: Literal["common", "per_image"] = "common"
    """``common``: one key for all images. ``per_image``: a fresh key for every image, kept by nobody."""
    colour_shuffle: bool = False
    """Also permute the colours of each pixel."""
    parity: int | None = Field(None, ge=0, lt=2**32)
    """Draw the inversions from this seed as published code does, to compare with it. Not a secret key."""

    @model_validator(mode="after")
    def _fits_together(self) -> PixelOptions:
        if self.parity is not None and self.colour_shuffle:
            raise ValueError("parity has no colour_shuffle: the published code has none")
        if self.parity is not None and self.keys == "per_image":
            raise ValueError("parity is one seed for all images; allowed with keys 'common' only")
        if self.key_file is not None and self.keys == "per_image":
            raise ValueError("key_file names a common key; keys 'per_image' draws its own")
        return self


class Pixel(Cipher):
    """Negative-positive inversion per value, optionally a colour permutation per pixel; nothing moves between pixels.

    Reversible with a common key.
    """

    Options: ClassVar[type[registry.MethodConfig]] = PixelOptions
    block: ClassVar[int] = 1
    adaptation: ClassVar[str] = "pixel"
    augment: ClassVar[Literal["before", "after"]] = "after"

    def __init__(self, options: PixelOptions, *, channels: int = 3, key: Key | None = None) -> None:
        super().__init__(options, channels=channels)
        self._key = require_key(key, options.name) if self.needs_key(options) else None

    @classmethod
    def problem(cls, options: Any, channels: int) -> str | None:
        if options.colour_shuffle and channels != 3:
            return f"protection.colour_shuffle needs data.channels 3, found {channels}"
        return None

    @classmethod
    def needs_key(cls, options: Any) -> bool:
        return options.parity is None and options.keys == "common"

    def expand(self, height: int, width: int) -> tuple[np.ndarray | None, np.ndarray]:
        size = f"{height} x {width}"
        num = height * width * self.channels
        if self.options.parity is not None:
            drawn = np.random.RandomState(self.options.parity).randint(0, 2, size=(height, width, self.channels))
            return None, (drawn.ravel() * 255).astype(np.uint8)
        key = self._key
        assert key is not None
        mask = key.bits(f"pixel inversions {size}", num) * np.uint8(255)
        if not self.options.colour_shuffle:
            return None, mask
        orders = ORDERS[key.integers(f"pixel colours {size}", height * width, len(ORDERS))]
        return (np.arange(height * width)[:, None] * 3 + orders).ravel(), mask

    @torch.inference_mode()
    def protect(self, images: Tensor) -> Tensor:
        if self.options.keys == "common":
            return super().protect(images)
        num = images.numel()
        key = Key.generate()  # its stream is longer than the batch, so every image gets bits of its own
        mask = torch.from_numpy(key.bits("inversions", num) * np.uint8(255)).to(images.device)
        orders = key.integers("colours", num // 3, len(ORDERS)) if self.options.colour_shuffle else None
        return self._protect(images, self._fresh(images, mask, None if orders is None else torch.from_numpy(orders)))

    def unprotect(self, protected: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Return the plain images, exactly; raises ValueError where nobody kept the keys."""
        if self.options.keys == "per_image":
            raise ValueError("pixel with keys per_image cannot be undone: nobody keeps the keys")
        return super().unprotect(protected, size)

    def training_table(self, images: Tensor) -> Table:
        """With a key per image: one drawn from torch's generator, so that training repeats under its seed."""
        if self.options.keys == "common":
            return self.table(images)
        mask = torch.randint(0, 2, (images.numel(),), dtype=torch.uint8, device=images.device) * 255
        orders = torch.randint(0, len(ORDERS), (images.numel() // 3,)) if self.options.colour_shuffle else None
        return self._fresh(images, mask, orders)

    def _fresh(self, images: Tensor, mask: Tensor, orders: Tensor | None) -> Table:
        index = None
        if orders is not None:
            pixels = torch.arange(images[0].numel() // 3)[:, None] * 3  # (H * W, 1), of each pixel the first value
            chosen = torch.from_numpy(ORDERS)[orders].view(-1, len(images), 3)
            index = (pixels[:, None] + chosen).permute(0, 2, 1).flatten(0, 1).to(images.device)
        return Table(index, mask.view(-1, len(images)))
