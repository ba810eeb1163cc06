"""T3: recover the key of Tanaka's cipher (LE) from a few photographs and their protected versions.

All blocks of all images share one key, so that each of the 96 half bytes of a block is seen once per block: where an
output always equals one input, or always its inversion, that input is its source. Source: ours; that known plaintexts
break such schemes is stated in many places.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from raypp.attacks.base import Attack, AttackError, Threat
from raypp.protections.cipher import from_symbols, to_symbols
from raypp.utils import registry

BLOCK = 4
LEAST = 0.9


class KnownPlaintextOptions(registry.MethodConfig):
    name: Literal["known_plaintext"] = "known_plaintext"
    num_pairs: int = Field(1, ge=1)
    """Known images that are used."""


class KnownPlaintext(Attack):
    """Matches columns of half bytes over all blocks of all known pairs."""

    Options: ClassVar[type[registry.MethodConfig]] = KnownPlaintextOptions
    threat: ClassVar[Threat] = Threat.T3
    needs: ClassVar[tuple[str, ...]] = ("pairs",)

    def prepare(self) -> None:
        assert self.access.pairs is not None
        plain, protected = (images[: self.options.num_pairs].cpu() for images in self.access.pairs)
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
            """Half bytes (blocks of all images, 96) of the part of the images that padding does not touch."""
            symbols = to_symbols(images[:, :, :rows, :columns], BLOCK, True)
            return symbols.view(-1, size, len(images)).permute(2, 0, 1).reshape(-1, size)

        before, after = blocks(plain), blocks(protected)
        same = torch.stack([(before == after[:, j : j + 1]).all(0) for j in range(size)])  # (output, input)
        inverted = torch.stack([(15 - before == after[:, j : j + 1]).all(0) for j in range(size)])
        candidates = same | inverted
        num = candidates.sum(1)
        self.solved = float((num == 1).float().mean())
        if float((num > 0).float().mean()) < LEAST:
            raise AttackError("attack known_plaintext found no permutation of half bytes that explains the pairs")
        self.source = _assign(candidates)
        flipped = inverted[torch.arange(size), self.source]
        self.mask = (flipped * 15).to(torch.uint8)
        self.note = f"{self.solved:.1%} of the half bytes located without doubt from {len(plain)} known image(s)"

    def reconstruct(self, protected: Tensor) -> Tensor:
        _, height, width = self.access.shape
        size = len(self.source)
        images = protected.cpu()
        symbols = to_symbols(images, BLOCK, True).view(-1, size, len(images)) ^ self.mask[:, None]
        plain = from_symbols(symbols[:, self.source.argsort()].flatten(0, 1), images.shape, BLOCK, True)
        return plain[:, :, :height, :width].to(protected.device)


def _assign(candidates: Tensor) -> Tensor:
    """A permutation that follows the candidates (output, input) as far as it can: those with fewest choices first."""
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
