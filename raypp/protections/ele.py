"""Extended learnable image encryption (ELE): a key for each 4 x 4 block, and the blocks shuffled.

Source: Madono, Tanaka, Onishi, Ogawa, "Block-wise scrambled image recognition using adaptation network", 2020.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np

from raypp.protections.base import require_key
from raypp.protections.cipher import Cipher, KeyedOptions
from raypp.utils import registry
from raypp.utils.keys import Key


class ELEOptions(KeyedOptions):
    name: Literal["ele"] = "ele"


class ELE(Cipher):
    """LE with a key per block position, then a permutation of the blocks; reversible."""

    Options: ClassVar[type[registry.MethodConfig]] = ELEOptions
    nibbles: ClassVar[bool] = True
    adaptation: ClassVar[str] = "shuffled_block"

    def __init__(self, options: ELEOptions, *, channels: int = 3, key: Key | None = None) -> None:
        super().__init__(options, channels=channels)
        self._key = require_key(key, options.name)

    @classmethod
    def needs_key(cls, options: Any) -> bool:
        return True

    def expand(self, height: int, width: int) -> tuple[np.ndarray | None, np.ndarray]:
        num_blocks, num = self.num_blocks(height, width), 2 * self.block**2 * self.channels
        size = f"{height} x {width}"
        orders = self._key.permutations(f"ele orders {size}", num_blocks, num)
        inverted = self._key.bits(f"ele inversions {size}", num_blocks * num).reshape(num_blocks, num)
        blocks = self._key.permutations(f"ele blocks {size}", 1, num_blocks)[0]
        index = blocks[:, None] * num + orders[blocks]
        return index.ravel(), (inverted[blocks] * np.uint8(15)).ravel()
