"""Extended learnable image encryption (ELE): a key for each 4 x 4 block, and the blocks shuffled.

Source: Madono, Tanaka, Onishi, Ogawa, "Block-wise scrambled image recognition using adaptation network", 2020.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from raypp.protections.cipher import Cipher, KeyedOptions


class ELE(Cipher):
    """LE with a key per block position, then a permutation of the blocks; reversible."""

    class Options(KeyedOptions):
        name: Literal["ele"] = "ele"

    nibbles = True
    adaptation = "shuffled_block"

    def expand(self, height: int, width: int) -> tuple[np.ndarray | None, np.ndarray]:
        num_blocks, num_nibbles = self.num_blocks(height, width), 2 * self.block**2 * self.channels
        size = f"{height} x {width}"
        orders = self.key.permutations(f"ele orders {size}", num_blocks, num_nibbles)
        inverted = self.key.bits(f"ele inversions {size}", num_blocks * num_nibbles).reshape(num_blocks, num_nibbles)
        blocks = self.key.permutations(f"ele blocks {size}", 1, num_blocks)[0]
        index = blocks[:, None] * num_nibbles + orders[blocks]
        return index.ravel(), (inverted[blocks] * np.uint8(15)).ravel()
