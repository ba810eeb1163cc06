"""T3: recover the key of Tanaka's cipher (LE) from a few photographs and their protected versions.

All blocks of all images share one key, so each of the 96 half bytes of a block has one sample per block. If an output
always equals one input, or always its inversion, that input is its source. The method is ours; that known plaintexts
break such schemes is well known.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from raypp.attacks.base import Attack, AttackError, Shape, Threat, required
from raypp.protections.cipher import from_symbols, to_symbols
from raypp.utils.registry import MethodConfig

BLOCK = 4
MIN_EXPLAINED = 0.9  # share of half bytes that need a source


class KnownPlaintext(Attack):
    """Matches columns of half bytes over all blocks of all known pairs.

    Its attacker has no oracle to select a matcher, so the re-identification rate is that of a fixed one.
    """

    cost: ClassVar[str] = "Compares 96 columns over the blocks of the known pairs; it trains nothing."

    class Options(MethodConfig):
        name: Literal["known_plaintext"] = "known_plaintext"
        num_pairs: int = Field(1, ge=1)
        """Number of known images."""

    threat: ClassVar[Threat] = Threat.T3
    needs: ClassVar[tuple[str, ...]] = ("pairs",)

    def prepare(self) -> None:
        plain, protected = (images[: self.options.num_pairs].cpu() for images in required(self.access.pairs))
        channels, height, width = self.access.shape
        rows, columns = height // BLOCK * BLOCK, width // BLOCK * BLOCK
        sides = protected.shape[2:]
        if (
            protected.shape[:2] != plain.shape[:2]
            or min(rows, columns) < BLOCK
            or sides[0] < rows
            or sides[1] < columns
            or any(side % BLOCK for side in sides)
        ):
            raise AttackError("attack known_plaintext needs pairs of images with whole 4 x 4 blocks")
        size = 2 * BLOCK * BLOCK * channels

        def blocks(images: Tensor) -> Tensor:
            """Half bytes (blocks of all images, 96) of the images without padding."""
            symbols = to_symbols(images[:, :, :rows, :columns], BLOCK, True)
            return symbols.view(-1, size, len(images)).permute(2, 0, 1).reshape(-1, size)

        before, after = blocks(plain), blocks(protected)
        same = torch.stack([(before == after[:, j : j + 1]).all(0) for j in range(size)])  # (output, input)
        inverted = torch.stack([(15 - before == after[:, j : j + 1]).all(0) for j in range(size)])
        candidates = same | inverted
        num = candidates.sum(1)
        located = float((num == 1).float().mean())
        if float((num > 0).float().mean()) < MIN_EXPLAINED:
            raise AttackError("attack known_plaintext: no permutation of half bytes explains the pairs")
        self.source = _assign(candidates)
        flipped = inverted[torch.arange(size), self.source]
        self.mask = (flipped * 15).to(torch.uint8)
        self.note = f"{located:.1%} of the half bytes located with certainty from {len(plain)} known image(s)"

    def reconstruct(self, protected: Tensor) -> Tensor:
        return decrypt(protected.cpu(), self.source, self.mask, BLOCK, self.access.shape).to(protected.device)


def decrypt(protected: Tensor, source: Tensor, mask: Tensor, block: int, shape: Shape) -> Tensor:
    """Invert a cipher of half bytes and cut padding.

    Args:
        protected: uint8 (N, C, H', W').
        source: int64 (S,), the input of each output within a block.
        mask: uint8 (S,), 15 where an output is inverted.
        block: side of the blocks in pixels.
        shape: (C, H, W) of the plain images.
    """
    symbols = to_symbols(protected, block, True).view(-1, len(source), len(protected)) ^ mask[:, None]
    plain = from_symbols(symbols[:, source.argsort()].flatten(0, 1), protected.shape, block, True)
    return plain[:, :, : shape[1], : shape[2]]


def _assign(candidates: Tensor) -> Tensor:
    """Assign inputs to outputs from the candidates (output, input), those with the fewest choices first."""
    size = len(candidates)
    source = torch.full((size,), -1, dtype=torch.int64)
    free = torch.ones(size, dtype=torch.bool)
    for j in candidates.sum(1).argsort().tolist():
        options = (candidates[j] & free).nonzero().flatten()
        if len(options):
            source[j] = options[0]
            free[options[0]] = False
    source[source < 0] = free.nonzero().flatten()
    return source
