"""T4: recover a cipher's permutation and mask from a few chosen images, and invert it exactly.

Every keyed scheme of this field permutes symbols and inverts some of them. Protected zeros reveal the inversions;
images whose symbols are the digits of their position reveal the permutation. Source: Chang, Case 2020 (pixel-based
encryption, one image). By the same idea, Tanaka's cipher takes 3 blocks of one image, and any such cipher takes
1 + log16(symbols) images (ours).
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor

from raypp.attacks.base import MAX_VAL, Attack, AttackError, ImageMap, Threat, required
from raypp.attacks.known_plaintext import BLOCK, decrypt
from raypp.protections.cipher import from_symbols, to_symbols
from raypp.utils.registry import MethodConfig

DIGIT = 16


class ChosenPlaintext(Attack):
    """Recovers the key, verifies it on random images, and decrypts."""

    cost: ClassVar[str] = "Protects one to five chosen images; it trains nothing."

    class Options(MethodConfig):
        name: Literal["chosen_plaintext"] = "chosen_plaintext"
        scheme: Literal["auto", "pixel", "tanaka", "any"] = "auto"
        """``pixel`` and ``tanaka`` need one image; ``any`` inverts every permutation of half bytes with inversions (ELE
        and EtC too) from five images of 32 x 32; ``auto`` takes the first scheme that works."""

    threat: ClassVar[Threat] = Threat.T4
    needs: ClassVar[tuple[str, ...]] = ("protect",)
    max_validation: ClassVar[int] = MAX_VAL

    def prepare(self) -> None:
        solvers = {"pixel": self._solve_pixel, "tanaka": self._solve_tanaka, "any": self._solve_any}
        scheme = self.options.scheme
        generator = torch.Generator().manual_seed(self.seed)
        probe = torch.randint(0, 256, (4, *self.access.shape), dtype=torch.uint8, generator=generator)
        for name in solvers if scheme == "auto" else [scheme]:
            num, undo = solvers[name]()
            if undo is not None and torch.equal(undo(self._oracle(probe)), probe):
                self._undo = undo
                self.note = f"key recovered from {num} chosen image{'s' * (num != 1)} ({name})"
                return
        raise AttackError("attack chosen_plaintext: no permutation with inversions explains this protection")

    def reconstruct(self, protected: Tensor) -> Tensor:
        return self._undo(protected.cpu()).to(protected.device)

    def _oracle(self, images: Tensor) -> Tensor:
        return required(self.access.protect)(images).cpu()

    def _solve_pixel(self) -> tuple[int, ImageMap | None]:
        """One image of (1, 2, 3) in every pixel: values above 127 are inverted, and 1, 2, 3 are the channels."""
        channels, height, width = self.access.shape
        values = torch.arange(1, channels + 1, dtype=torch.uint8).view(1, -1, 1, 1)
        protected = self._oracle(values.expand(1, channels, height, width).contiguous())
        if protected.shape[1:] != self.access.shape:
            return 1, None
        inverted = protected > 127
        source = torch.where(inverted, 255 - protected, protected).long() - 1
        if not ((source >= 0) & (source < channels)).all() or not source.sort(1).values.eq(values.long() - 1).all():
            return 1, None
        back, mask = source.argsort(1), inverted.to(torch.uint8) * 255
        return 1, lambda protected: (protected ^ mask).gather(1, back.expand(protected.shape))

    def _solve_tanaka(self) -> tuple[int, ImageMap | None]:
        """Three blocks of one image: zeros, and the two digits of each half byte's position in its block."""
        channels, height, width = self.access.shape
        size = 2 * BLOCK * BLOCK * channels
        image = torch.zeros(1, channels, -(-height // BLOCK) * BLOCK, -(-width // BLOCK) * BLOCK, dtype=torch.uint8)
        columns = image.shape[3] // BLOCK
        blocks = [y * columns + x for y in range(height // BLOCK) for x in range(width // BLOCK)][:3]
        if len(blocks) < 3:
            return 1, None
        symbols = to_symbols(image, BLOCK, True).view(-1, size)
        symbols[blocks] = _position_digits(size)
        chosen = from_symbols(symbols.view(-1, 1), image.shape, BLOCK, True)
        protected = self._oracle(chosen[:, :, :height, :width].contiguous())
        if protected.shape != image.shape:
            return 1, None
        return 1, self._undo_from(to_symbols(protected, BLOCK, True).view(-1, size)[blocks], BLOCK)

    def _solve_any(self) -> tuple[int, ImageMap | None]:
        """Zeros, and an image per digit of each half byte's position in the image.

        Protected images must have the size of plain ones, because the attacker cannot choose a cipher's padding.
        """
        digits = _position_digits(2 * math.prod(self.access.shape))
        shape = torch.Size((len(digits), *self.access.shape))
        protected = self._oracle(from_symbols(digits.t(), shape, 1, True))
        if protected.shape != shape:
            return len(digits), None
        return len(digits), self._undo_from(to_symbols(protected, 1, True).t(), 1)

    def _undo_from(self, symbols: Tensor, block: int) -> ImageMap | None:
        """Read mask and permutation from protected :func:`_position_digits`; None if there is no permutation."""
        mask = symbols[0]
        powers = DIGIT ** torch.arange(len(symbols) - 1)
        source = (powers[:, None] * (symbols[1:] ^ mask)).sum(0)
        if not torch.equal(source.sort().values, torch.arange(len(source))):
            return None
        return lambda protected: decrypt(protected, source, mask, block, self.access.shape)


def _position_digits(size: int) -> Tensor:
    """Return zeros, then the hexadecimal digits of 0 .. size - 1 from the lowest, uint8 (1 + digits, size)."""
    position = torch.arange(size)
    digits = [torch.zeros(size, dtype=torch.uint8)]
    while DIGIT ** (len(digits) - 1) < size:
        digits.append((position // DIGIT ** (len(digits) - 1) % DIGIT).to(torch.uint8))
    return torch.stack(digits)
