"""Pixel ciphers: every keyed scheme permutes an image's values and inverts some of them.

An image is split into square blocks and read block by block as a sequence of symbols: its bytes or their halves
("nibbles"). A scheme is a permutation of the symbols and an XOR mask, both expanded from the key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from raypp.protections.base import Protection
from raypp.utils import paths, registry
from raypp.utils.images import to_uint8
from raypp.utils.keys import Key

MAX_TABLES = 16


class KeyedOptions(registry.MethodConfig):
    """Options of every keyed protection."""

    key_file: paths.PathOrUri | None = None
    """Read the key from this file instead of generating one."""


@dataclass(frozen=True, eq=False)
class Table:
    """A key, expanded for images of one size.

    Attributes:
        index: int64 (S,), or (S, N) for a key per image: the source of each output symbol; None: no permutation.
        mask: uint8 (S, 1), or (S, N) for a key per image: XORed with the output symbols.
    """

    index: Tensor | None
    mask: Tensor


class Cipher(Protection):
    """A permutation of symbols and a mask; subclasses expand their key in :meth:`expand`.

    If a side is not a multiple of ``block``, the last row or column is repeated up to the next multiple. ``unprotect``
    then needs the original size.
    """

    block: int = 4
    """Side of a block in pixels."""
    nibbles: ClassVar[bool] = False
    """Whether symbols are nibbles instead of bytes."""

    def __init__(self, options: Any, *, channels: int = 3, key: Key | None = None) -> None:
        super().__init__(options, channels=channels, key=key)
        self._tables: dict[tuple[int, int, torch.device], Table] = {}

    @classmethod
    def needs_key(cls, options: Any) -> bool:
        return True

    def expand(self, height: int, width: int) -> tuple[np.ndarray | None, np.ndarray]:
        """Expand the key for padded images of this size: index (S,) or None, and mask (S,)."""
        raise NotImplementedError

    def num_blocks(self, height: int, width: int) -> int:
        return (height // self.block) * (width // self.block)

    def forward(self, images: Tensor) -> Tensor:
        """Protect float images, rounded to 8 bits first because a cipher works on bytes."""
        return self._apply_table(to_uint8(images), self.training_table(images)).to(images.dtype) / 255

    @torch.inference_mode()
    def protect(self, images: Tensor) -> Tensor:
        return self._apply_table(images, self.table(images))

    @torch.inference_mode()
    def unprotect(self, protected: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Invert :meth:`protect` exactly.

        Args:
            protected: uint8 (N, C, H, W), as :meth:`protect` returns them.
            size: (H, W) of the plain images; None if their sides are multiples of ``block``.
        """
        table = self.table(protected)
        symbols = to_symbols(protected, self.block, self.nibbles) ^ table.mask
        if table.index is not None:
            symbols = symbols.index_select(0, torch.argsort(table.index))
        plain = from_symbols(symbols, protected.shape, self.block, self.nibbles)
        return plain if size is None else plain[:, :, : size[0], : size[1]]

    def table(self, images: Tensor) -> Table:
        """Return the key's table for images N x C x H x W, expanded once per size and device."""
        height, width = (-(-side // self.block) * self.block for side in images.shape[-2:])
        cache_key = (height, width, images.device)
        if cache_key not in self._tables:
            while len(self._tables) >= MAX_TABLES:  # a client may send images of any number of sizes
                self._tables.pop(next(iter(self._tables)))
            index, mask = self.expand(height, width)
            self._tables[cache_key] = Table(
                None if index is None else torch.from_numpy(index).to(images.device),
                torch.from_numpy(mask).to(images.device)[:, None],
            )
        return self._tables[cache_key]

    def training_table(self, images: Tensor) -> Table:
        """Return the table for training and evaluation; it differs from :meth:`table` for a key per image."""
        return self.table(images)

    def aligned(self, images: Tensor) -> Tensor:
        """Repeat the last row and column until both sides are multiples of ``block``."""
        for dim in (-2, -1):
            padding = -images.shape[dim] % self.block
            if padding:
                last = images.narrow(dim, images.shape[dim] - 1, 1)
                images = torch.cat((images, *[last] * padding), dim)
        return images

    def _apply_table(self, images: Tensor, table: Table) -> Tensor:
        images = self.aligned(images)
        symbols = to_symbols(images, self.block, self.nibbles)
        if table.index is not None:
            is_shared = table.index.ndim == 1
            symbols = symbols.index_select(0, table.index) if is_shared else symbols.gather(0, table.index)
        return from_symbols(symbols ^ table.mask, images.shape, self.block, self.nibbles)


def to_symbols(images: Tensor, block: int, nibbles: bool) -> Tensor:
    """Convert uint8 (N, C, H, W) to symbols (S, N): blocks in raster order, inside (row, column, channel).

    The low nibbles of a block come before its high ones. The order is that of the public code of Tanaka 2018. The
    batch is the last dimension, so that a permutation copies rows, not single bytes (3 to 4 times faster on a CPU).
    """
    num, channels, height, width = images.shape
    blocks = images.reshape(num, channels, height // block, block, width // block, block).permute(2, 4, 3, 5, 1, 0)
    if nibbles:
        blocks = blocks.reshape(-1, block * block * channels, num)
        blocks = torch.cat((blocks & 15, blocks >> 4), dim=1)
    return blocks.reshape(-1, num)


def from_symbols(symbols: Tensor, shape: torch.Size, block: int, nibbles: bool) -> Tensor:
    """Invert :func:`to_symbols`, for images of ``shape``."""
    num, channels, height, width = shape
    if nibbles:
        low, high = symbols.reshape(-1, 2 * block * block * channels, num).chunk(2, dim=1)
        symbols = (high << 4) | low
    blocks = symbols.reshape(height // block, width // block, block, block, channels, num)
    return blocks.permute(5, 4, 0, 2, 1, 3).reshape(shape)
