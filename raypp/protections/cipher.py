"""Ciphers on pixels: every keyed scheme of this field permutes an image's values and inverts some of them.

An image is cut into square blocks and read block by block as a row of symbols: its bytes, or their halves ("nibbles").
A scheme is then a permutation of these symbols and a mask that is XORed onto them, both expanded from the key.
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

MAX_TABLES = 16


class KeyedOptions(registry.MethodConfig):
    """Options of every keyed protection."""

    key_file: paths.PathOrUri | None = None
    """Take the key from this file instead of making a new one."""


@dataclass(frozen=True, eq=False)
class Table:
    """What one key does to images of one size.

    Attributes:
        index: int64 (S,), or (S, N) for a key per image: where output symbol j comes from; None where nothing moves.
        mask: uint8 (S, 1), or (S, N) for a key per image: XORed onto the output symbols.
    """

    index: Tensor | None
    mask: Tensor


class Cipher(Protection):
    """A permutation of symbols and a mask; subclasses expand their key in :meth:`expand`.

    Images whose sides are no multiple of ``block`` are protected in the next larger size, their last row and column
    repeated; ``unprotect`` then needs the original size.
    """

    block: ClassVar[int] = 4
    nibbles: ClassVar[bool] = False

    def __init__(self, options: Any, *, channels: int = 3) -> None:
        super().__init__()
        self.options, self.channels = options, channels
        self._tables: dict[tuple[int, int, torch.device], Table] = {}

    def expand(self, height: int, width: int) -> tuple[np.ndarray | None, np.ndarray]:
        """Expand the key for padded images of this size into an index (S,), or None, and a mask (S,)."""
        raise NotImplementedError

    def num_blocks(self, height: int, width: int) -> int:
        return (height // self.block) * (width // self.block)

    def forward(self, images: Tensor) -> Tensor:
        """Protect float images; they are rounded to 8 bits first, as a cipher works on bytes."""
        return self._protect(to_uint8(images), self.training_table(images)).to(images.dtype) / 255

    @torch.inference_mode()
    def protect(self, images: Tensor) -> Tensor:
        return self._protect(images, self.table(images))

    @torch.inference_mode()
    def unprotect(self, protected: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Return the plain images, exactly.

        Args:
            protected: uint8 (N, C, H, W), as :meth:`protect` returned them.
            size: (H, W) of the plain images; None where their sides are multiples of the block's.
        """
        table = self.table(protected)
        symbols = to_symbols(protected, self.block, self.nibbles) ^ table.mask
        if table.index is not None:
            symbols = symbols.index_select(0, torch.argsort(table.index))
        plain = from_symbols(symbols, protected.shape, self.block, self.nibbles)
        return plain if size is None else plain[:, :, : size[0], : size[1]]

    def table(self, images: Tensor) -> Table:
        """The key's table for images N x C x H x W, expanded once per size and device."""
        height, width = (-(-side // self.block) * self.block for side in images.shape[-2:])
        at = (height, width, images.device)
        if at not in self._tables:
            while len(self._tables) >= MAX_TABLES:  # a client may bring images of any number of sizes
                self._tables.pop(next(iter(self._tables)))
            index, mask = self.expand(height, width)
            moved = None if index is None else torch.from_numpy(index).to(images.device)
            self._tables[at] = Table(moved, torch.from_numpy(mask).to(images.device)[:, None])
        return self._tables[at]

    def training_table(self, images: Tensor) -> Table:
        """The table that training and evaluation use; another one only where every image has a key of its own."""
        return self.table(images)

    def aligned(self, images: Tensor) -> Tensor:
        """Repeat the last row and column until both sides are multiples of the block's."""
        for dim in (-2, -1):
            missing = -images.shape[dim] % self.block
            if missing:
                last = images.narrow(dim, images.shape[dim] - 1, 1)
                images = torch.cat((images, *[last] * missing), dim)
        return images

    def _protect(self, images: Tensor, table: Table) -> Tensor:
        images = self.aligned(images)
        symbols = to_symbols(images, self.block, self.nibbles)
        if table.index is not None:
            common = table.index.ndim == 1
            symbols = symbols.index_select(0, table.index) if common else symbols.gather(0, table.index)
        return from_symbols(symbols ^ table.mask, images.shape, self.block, self.nibbles)


def to_symbols(images: Tensor, block: int, nibbles: bool) -> Tensor:
    """uint8 (N, C, H, W) to symbols (S, N): blocks in raster order, inside (row, column, channel), low half first.

    Reading order as in the public code of Tanaka 2018. The batch comes last, so that a permutation copies rows of it
    and not single bytes (on a CPU 3 to 4 times the images/s).
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
