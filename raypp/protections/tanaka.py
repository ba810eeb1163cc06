"""Tanaka's learnable image encryption (LE): one key for every 4 x 4 block of every image.

Source: M. Tanaka, "Learnable image encryption", ICCE-TW 2018; order of symbols as in its public code. Each block's 48
bytes become 96 nibbles; the key permutes them and inverts some. With ``parity`` the mask comes from the permutation, as
in that code: 47 of 96 nibbles are marked, before and after the permutation. Our keys have a separate mask.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from pydantic import Field

from raypp.protections.cipher import Cipher, KeyedOptions
from raypp.utils.keys import Key


class Tanaka(Cipher):
    """LE on 4 x 4 blocks; reversible."""

    class Options(KeyedOptions):
        name: Literal["tanaka"] = "tanaka"
        parity: int | None = Field(None, ge=0, lt=2**32)
        """Draw the permutation from this seed as published code does, for comparison. Not a secret key."""

    nibbles = True
    adaptation = "block"

    def __init__(self, options: Options, *, channels: int = 3, key: Key | None = None) -> None:
        super().__init__(options, channels=channels, key=key)
        num = 2 * self.block**2 * channels
        if options.parity is not None:
            self._order = np.random.RandomState(options.parity).permutation(num)
            marked = self._order > num // 2
            self._inverted = marked ^ marked[self._order]
        else:
            self._order = self.key.permutations("tanaka order", 1, num)[0]
            self._inverted = self.key.bits("tanaka inversion", num).astype(bool)

    @classmethod
    def needs_key(cls, options: Any) -> bool:
        return options.parity is None

    def expand(self, height: int, width: int) -> tuple[np.ndarray | None, np.ndarray]:
        num_blocks = self.num_blocks(height, width)
        starts = np.arange(num_blocks)[:, None] * len(self._order)
        mask = np.where(self._inverted, 15, 0).astype(np.uint8)
        return (starts + self._order).ravel(), np.tile(mask, num_blocks)
