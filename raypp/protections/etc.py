"""Encryption-then-compression (EtC): blocks shuffled, rotated, flipped, inverted, their colours permuted.

Source: Kurihara, Shiota, Kiya 2015; Chuman, Sirichotedumrong, Kiya 2019. The colour step is a true permutation: public
re-implementations copy channels through aliased views and lose information in five of six cases.
"""

from __future__ import annotations

from itertools import permutations, product
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from raypp.protections.base import require_key
from raypp.protections.cipher import Cipher, KeyedOptions
from raypp.utils import registry
from raypp.utils.keys import Key


class EtCOptions(KeyedOptions):
    name: Literal["etc"] = "etc"
    block: int = Field(4, ge=1, le=64)
    """Side of a block in pixels; EtC images that are stored as JPEG use 8 or 16."""


class EtC(Cipher):
    """Block-wise rotation, flip, negative-positive, colour permutation and block shuffling; reversible."""

    Options: ClassVar[type[registry.MethodConfig]] = EtCOptions
    adaptation: ClassVar[str] = "shuffled_block"

    def __init__(self, options: EtCOptions, *, channels: int = 3, key: Key | None = None) -> None:
        super().__init__(options, channels=channels)
        self.block = options.block  # type: ignore[misc]
        self._key = require_key(key, options.name)

    @classmethod
    def needs_key(cls, options: Any) -> bool:
        return True

    def expand(self, height: int, width: int) -> tuple[np.ndarray | None, np.ndarray]:
        num_blocks, num = self.num_blocks(height, width), self.block**2 * self.channels
        size = f"{height} x {width}"
        moves = self._moves()
        chosen = self._key.integers(f"etc moves {size}", num_blocks, len(moves))
        inverted = self._key.bits(f"etc inversions {size}", num_blocks)
        blocks = self._key.permutations(f"etc blocks {size}", 1, num_blocks)[0]
        index = blocks[:, None] * num + moves[chosen[blocks]]
        return index.ravel(), np.repeat(inverted[blocks] * np.uint8(255), num)

    def _moves(self) -> np.ndarray:
        """Every combination of 4 rotations, 3 flips and the colours' permutations as an index, (num, symbols)."""
        pixels = np.arange(self.block**2 * self.channels).reshape(self.block, self.block, self.channels)
        flips = (lambda x: x, lambda x: x[::-1], lambda x: x[:, ::-1])
        colours = list(permutations(range(self.channels)))
        return np.stack(
            [
                flip(np.rot90(pixels, turns))[:, :, list(order)].ravel()
                for turns, flip, order in product(range(4), flips, colours)
            ]
        )
