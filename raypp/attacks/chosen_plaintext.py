"""T4: recover a cipher's permutation and mask from a few images of one's own choice, and undo it exactly.

Every keyed scheme of this field permutes symbols and inverts some of them. The protected zeros show what is inverted;
images whose symbols are digits of their own place show where each one went. Sources: Chang, Li 2020 (pixel-based
encryption, one image); Tanaka's cipher in 3 blocks of one image, and any such cipher at all in 1 + log16(symbols)
images: ours, by the same idea.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from torch import Tensor

from raypp.attacks.base import Attack, AttackError, Threat
from raypp.protections.cipher import from_symbols, to_symbols
from raypp.utils import registry

BLOCK = 4
DIGIT = 16
Undo = Callable[[Tensor], Tensor]


class ChosenPlaintextOptions(registry.MethodConfig):
    name: Literal["chosen_plaintext"] = "chosen_plaintext"
    scheme: Literal["auto", "pixel", "tanaka", "any"] = "auto"
    """``pixel`` and ``tanaka`` take one image; ``any`` undoes every permutation of half bytes with inversions (ELE and
    EtC too) from five images of 32 x 32; ``auto`` takes the first of them that works."""


class ChosenPlaintext(Attack):
    """Solves the key, checks the solution on images that it has not seen, and then decrypts."""

    Options: ClassVar[type[registry.MethodConfig]] = ChosenPlaintextOptions
    threat: ClassVar[Threat] = Threat.T4
    needs: ClassVar[tuple[str, ...]] = ("protect",)

    def prepare(self) -> None:
        solvers = {"pixel": self._solve_pixel, "tanaka": self._solve_tanaka, "any": self._solve_any}
        chosen = solvers if self.options.scheme == "auto" else {self.options.scheme: solvers[self.options.scheme]}
        generator = torch.Generator().manual_seed(self.seed)
        probe = torch.randint(0, 256, (4, *self.access.shape), dtype=torch.uint8, generator=generator)
        for name, solve in chosen.items():
            num, undo = solve()
            if undo is not None and torch.equal(undo(self._oracle(probe)), probe):
                self._undo = undo
                self.note = f"key recovered from {num} chosen image{'s' * (num != 1)} ({name})"
                return
        raise AttackError("attack chosen_plaintext found no permutation with inversions that explains this protection")

    def reconstruct(self, protected: Tensor) -> Tensor:
        return self._undo(protected.cpu()).to(protected.device)

    def _oracle(self, images: Tensor) -> Tensor:
        assert self.access.protect is not None
        return self.access.protect(images).cpu()

    def _solve_pixel(self) -> tuple[int, Undo | None]:
        """One image of (1, 2, 3) in every pixel: values above 127 were inverted, and 1, 2, 3 name the channels."""
        channels, height, width = self.access.shape
        values = torch.arange(1, channels + 1, dtype=torch.uint8).view(1, -1, 1, 1)
        seen = self._oracle(values.expand(1, channels, height, width).contiguous())
        if seen.shape[1:] != self.access.shape:
            return 1, None
        inverted = seen > 127
        source = torch.where(inverted, 255 - seen, seen).long() - 1
        if not ((source >= 0) & (source < channels)).all() or not source.sort(1).values.eq(values.long() - 1).all():
            return 1, None
        back, mask = source.argsort(1), inverted.to(torch.uint8) * 255
        return 1, lambda protected: (protected ^ mask).gather(1, back.expand(protected.shape))

    def _solve_tanaka(self) -> tuple[int, Undo | None]:
        """Three blocks of one image: zeros, and each half byte's place in its block modulo and divided by 16."""
        channels, height, width = self.access.shape
        size = 2 * BLOCK * BLOCK * channels
        image = torch.zeros(1, channels, -(-height // BLOCK) * BLOCK, -(-width // BLOCK) * BLOCK, dtype=torch.uint8)
        if height // BLOCK * (width // BLOCK) < 3 or height < BLOCK or width < BLOCK:
            return 1, None
        columns = image.shape[3] // BLOCK
        whole = [y * columns + x for y in range(height // BLOCK) for x in range(width // BLOCK)][:3]
        symbols = to_symbols(image, BLOCK, True).view(-1, size)
        place = torch.arange(size)
        symbols[whole[1]], symbols[whole[2]] = (place % DIGIT).to(torch.uint8), (place // DIGIT).to(torch.uint8)
        chosen = from_symbols(symbols.view(-1, 1), image.shape, BLOCK, True)
        answer = self._oracle(chosen[:, :, :height, :width].contiguous())
        if answer.shape != image.shape:
            return 1, None
        seen = to_symbols(answer, BLOCK, True).view(-1, size)
        mask = seen[whole[0]]
        source = (seen[whole[1]] ^ mask).long() + DIGIT * (seen[whole[2]] ^ mask).long()
        if not torch.equal(source.sort().values, place):
            return 1, None
        back = source.argsort()

        def undo(protected: Tensor) -> Tensor:
            found = to_symbols(protected, BLOCK, True).view(-1, size, len(protected)) ^ mask[:, None]
            plain = from_symbols(found[:, back].flatten(0, 1), protected.shape, BLOCK, True)
            return plain[:, :, :height, :width]

        return 1, undo

    def _solve_any(self) -> tuple[int, Undo | None]:
        """Zeros, and an image per hexadecimal digit of each half byte's place in the image.

        Only images whose protected versions have their own size: what a cipher pads is not the attacker's to choose.
        """
        size = 2 * int(torch.tensor(self.access.shape).prod())
        place = torch.arange(size)
        digits = [torch.zeros(size, dtype=torch.uint8)]
        while DIGIT ** (len(digits) - 1) < size:
            digits.append((place // DIGIT ** (len(digits) - 1) % DIGIT).to(torch.uint8))
        shape = torch.Size((len(digits), *self.access.shape))
        answer = self._oracle(from_symbols(torch.stack(digits, 1), shape, 1, True))
        if answer.shape != shape:
            return len(digits), None
        seen = to_symbols(answer, 1, True)
        mask = seen[:, 0]
        source = torch.zeros(size, dtype=torch.int64)
        for i in range(1, len(digits)):
            source += (seen[:, i] ^ mask).long() * DIGIT ** (i - 1)
        if not torch.equal(source.sort().values, place):
            return len(digits), None
        back = source.argsort()

        def undo(protected: Tensor) -> Tensor:
            found = to_symbols(protected, 1, True) ^ mask[:, None]
            return from_symbols(found[back], protected.shape, 1, True)

        return len(digits), undo
