"""Encryption-then-compression (EtC): blocks are shuffled, rotated, flipped and inverted, their colors permuted.

Source: Kurihara, Shiota, Kiya 2015; Chuman, Sirichotedumrong, Kiya 2019. The color step is a true permutation. Public
re-implementations copy channels through aliased views and lose information in five of six cases.
"""

from __future__ import annotations

import itertools
from typing import Literal

import numpy as np
from pydantic import Field

from raypp.protections.cipher import Cipher, KeyedOptions
from raypp.utils.keys import Key


class EtC(Cipher):
    """Block-wise rotation, flip, inversion and color permutation, then block shuffling; reversible."""

    class Options(KeyedOptions):
        name: Literal["etc"] = "etc"
        block: int = Field(4, ge=1, le=64)
        """Side of a block in pixels; EtC images that are stored as JPEG use 8 or 16."""

    adaptation = "shuffled_block"

    def __init__(self, options: Options, *, channels: int = 3, key: Key | None = None) -> None:
        super().__init__(options, channels=channels, key=key)
        self.block = options.block

    def expand(self, height: int, width: int) -> tuple[np.ndarray | None, np.ndarray]:
        num_blocks, num_bytes = self.num_blocks(height, width), self.block**2 * self.channels
        size = f"{height} x {width}"
        permutations = self._block_permutations()
        choices = self.key.integers(f"etc moves {size}", num_blocks, len(permutations))
        inverted = self.key.bits(f"etc inversions {size}", num_blocks)
        blocks = self.key.permutations(f"etc blocks {size}", 1, num_blocks)[0]
        index = blocks[:, None] * num_bytes + permutations[choices[blocks]]
        return index.ravel(), np.repeat(inverted[blocks] * np.uint8(255), num_bytes)

    def _block_permutations(self) -> np.ndarray:
        """Return all combinations of 4 rotations, 3 flips and the color permutations as indices (num, num_bytes)."""
        pixels = np.arange(self.block**2 * self.channels).reshape(self.block, self.block, self.channels)
        flips = (lambda x: x, lambda x: x[::-1], lambda x: x[:, ::-1])
        channel_orders = itertools.permutations(range(self.channels))
        return np.stack(
            [
                flip(np.rot90(pixels, turns))[:, :, list(order)].ravel()
                for turns, flip, order in itertools.product(range(4), flips, channel_orders)
            ]
        )
