"""Pixel-based encryption (PE): each value is inverted or not, and each pixel's colors are permuted.

Sources: Sirichotedumrong, Maekawa, Kinoshita, Kiya, ICIP 2019 (one key for all images); Sirichotedumrong, Kinoshita,
Kiya, IEEE Access 2019 (a key per image that is not stored, "without key management"). ``parity`` draws the inversions
from NumPy's RandomState, as the authors' public code does.
"""

from __future__ import annotations

from itertools import permutations
from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from raypp.protections.cipher import Cipher, KeyedOptions, Table
from raypp.utils.keys import Key

CHANNEL_ORDERS = np.array(list(permutations(range(3))))


class Pixel(Cipher):
    """Inversion per value and optionally a color permutation per pixel; reversible with a common key."""

    class Options(KeyedOptions):
        name: Literal["pixel"] = "pixel"
        keys: Literal["common", "per_image"] = "common"
        """``common``: one key for all images. ``per_image``: a fresh key for every image, which is not stored."""
        shuffle_color_channels: bool = False
        """Also permute the colors of each pixel."""
        parity: int | None = Field(None, ge=0, lt=2**32)
        """Draw the inversions from this seed as published code does, for comparison. Not a secret key."""

        @model_validator(mode="after")
        def _check_combination(self) -> Self:
            if self.parity is not None and self.shuffle_color_channels:
                raise ValueError("parity has no shuffle_color_channels: the published code has none")
            if self.parity is not None and self.keys == "per_image":
                raise ValueError("parity is one seed for all images; allowed with keys 'common' only")
            if self.key_file is not None and self.keys == "per_image":
                raise ValueError("key_file names a common key; keys 'per_image' draws its own")
            return self

    block = 1
    adaptation = "pixel"
    augment = "after"

    @classmethod
    def problem(cls, options: Any, channels: int) -> str | None:
        if options.shuffle_color_channels and channels != 3:
            return f"protection.shuffle_color_channels needs data.channels 3, not {channels}"
        return None

    @classmethod
    def needs_key(cls, options: Any) -> bool:
        return options.parity is None and options.keys == "common"

    def expand(self, height: int, width: int) -> tuple[np.ndarray | None, np.ndarray]:
        size = f"{height} x {width}"
        num = height * width * self.channels
        if self.options.parity is not None:
            inverted = np.random.RandomState(self.options.parity).randint(0, 2, size=(height, width, self.channels))
            return None, (inverted.ravel() * 255).astype(np.uint8)
        mask = self.key.bits(f"pixel inversions {size}", num) * np.uint8(255)
        if not self.options.shuffle_color_channels:
            return None, mask
        orders = CHANNEL_ORDERS[self.key.integers(f"pixel colours {size}", height * width, len(CHANNEL_ORDERS))]
        return (np.arange(height * width)[:, None] * 3 + orders).ravel(), mask

    @torch.inference_mode()
    def protect(self, images: Tensor) -> Tensor:
        if self.options.keys == "common":
            return super().protect(images)
        key = Key.generate()  # its stream is longer than the batch, so every image has different bits
        mask = torch.from_numpy(key.bits("inversions", images.numel()) * np.uint8(255)).to(images.device)
        orders = None
        if self.options.shuffle_color_channels:
            orders = torch.from_numpy(key.integers("colours", images.numel() // 3, len(CHANNEL_ORDERS)))
        return self._apply_table(images, self._table_per_image(images, mask, orders))

    def unprotect(self, protected: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Invert :meth:`protect` exactly; raises ValueError with a key per image."""
        if self.options.keys == "per_image":
            raise ValueError("pixel with keys per_image cannot be undone: the keys are not stored")
        return super().unprotect(protected, size)

    def training_table(self, images: Tensor) -> Table:
        """Return a table from torch's generator for a key per image, so that training is reproducible."""
        if self.options.keys == "common":
            return self.table(images)
        mask = torch.randint(0, 2, (images.numel(),), dtype=torch.uint8, device=images.device) * 255
        orders = (
            torch.randint(0, len(CHANNEL_ORDERS), (images.numel() // 3,))
            if self.options.shuffle_color_channels
            else None
        )
        return self._table_per_image(images, mask, orders)

    def _table_per_image(self, images: Tensor, mask: Tensor, orders: Tensor | None) -> Table:
        index = None
        if orders is not None:
            pixels = torch.arange(images[0].numel() // 3)[:, None] * 3  # (H * W, 1): the first value of each pixel
            channels = torch.from_numpy(CHANNEL_ORDERS)[orders].view(-1, len(images), 3)
            index = (pixels[:, None] + channels).permute(0, 2, 1).flatten(0, 1).to(images.device)
        return Table(index, mask.view(-1, len(images)))
