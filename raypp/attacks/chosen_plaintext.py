"""T4: recover a cipher's permutation and mask from a few chosen images, and invert it exactly.

Every keyed scheme of this field permutes symbols and inverts some of them. Protected zeros reveal the inversions;
images whose symbols are the digits of their position reveal the permutation. Source: Chang, Li 2020 (pixel-based
encryption, one image). By the same idea, Tanaka's cipher takes 3 blocks of one image, and any such cipher takes
1 + log16(symbols) images (ours).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from torch import Tensor

from raypp.attacks.base import Attack, AttackError, Threat
from raypp.attacks.known_plaintext import BLOCK, decrypt
from raypp.protections.cipher import from_symbols, to_symbols
from raypp.utils import registry

DIGIT = 16
Undo = Callable[[Tensor], Tensor]


class ChosenPlaintextOptions(registry.MethodConfig):
    name: Literal["chosen_plaintext"] = "chosen_plaintext"
    scheme: Literal["auto", "pixel", "tanaka", "any"] = "auto"
    """``pixel`` and ``tanaka`` need one image; ``any`` inverts every permutation of half bytes with inversions (ELE and
    EtC too) from five images of 32 x 32; ``auto`` takes the first scheme that works."""


class ChosenPlaintext(Attack):
    """Recovers the key, verifies it on random images, and decrypts."""

    Options: ClassVar[type[registry.MethodConfig]] = ChosenPlaintextOptions
    threat: ClassVar[Threat] = Threat.T4
    needs: ClassVar[tuple[str, ...]] = ("protect",)

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
        assert self.access.protect is not None
        return self.access.protect(images).cpu()

    def _solve_pixel(self) -> tuple[int, Undo | None]:
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

    def _solve_tanaka(self) -> tuple[int, Undo | None]:
        """Three blocks of one image: zeros, and each half byte's position in its block modulo and divided by 16."""
        channels, height, width = self.access.shape
        size = 2 * BLOCK * BLOCK * channels
        image = torch.zeros(1, channels, -(-height // BLOCK) * BLOCK, -(-width // BLOCK) * BLOCK, dtype=torch.uint8)
        if height // BLOCK * (width // BLOCK) < 3 or height < BLOCK or width < BLOCK:
            return 1, None
        columns = image.shape[3] // BLOCK
        blocks = [y * columns + x for y in range(height // BLOCK) for x in range(width // BLOCK)][:3]
        symbols = to_symbols(image, BLOCK, True).view(-1, size)
        position = torch.arange(size)
        symbols[blocks[1]], symbols[blocks[2]] = (position % DIGIT).to(torch.uint8), (position // DIGIT).to(torch.uint8)
        chosen = from_symbols(symbols.view(-1, 1), image.shape, BLOCK, True)
        protected = self._oracle(chosen[:, :, :height, :width].contiguous())
        if protected.shape != image.shape:
            return 1, None
        symbols = to_symbols(protected, BLOCK, True).view(-1, size)
        mask = symbols[blocks[0]]
        source = (symbols[blocks[1]] ^ mask).long() + DIGIT * (symbols[blocks[2]] ^ mask).long()
        if not torch.equal(source.sort().values, position):
            return 1, None
        return 1, lambda protected: decrypt(protected, source, mask, BLOCK, self.access.shape)

    def _solve_any(self) -> tuple[int, Undo | None]:
        """Zeros, and an image per hexadecimal digit of each half byte's position in the image.

        Protected images must have the size of plain ones, because the attacker cannot choose a cipher's padding.
        """
        size = 2 * int(torch.tensor(self.access.shape).prod())
        position = torch.arange(size)
        digits = [torch.zeros(size, dtype=torch.uint8)]
        while DIGIT ** (len(digits) - 1) < size:
            digits.append((position // DIGIT ** (len(digits) - 1) % DIGIT).to(torch.uint8))
        shape = torch.Size((len(digits), *self.access.shape))
        protected = self._oracle(from_symbols(torch.stack(digits, 1), shape, 1, True))
        if protected.shape != shape:
            return len(digits), None
        symbols = to_symbols(protected, 1, True)
        mask = symbols[:, 0]
        source = torch.zeros(size, dtype=torch.int64)
        for i in range(1, len(digits)):
            source += (symbols[:, i] ^ mask).long() * DIGIT ** (i - 1)
        if not torch.equal(source.sort().values, position):
            return len(digits), None
        return len(digits), lambda protected: decrypt(protected, source, mask, 1, self.access.shape)
