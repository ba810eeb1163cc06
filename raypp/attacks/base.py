"""What every attack is: a threat level, what it needs of its victim, and reconstructions of protected images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, ClassVar

from torch import Tensor

from raypp.errors import RayppError
from raypp.registry import Options

Map = Callable[[Tensor], Tensor]
"""uint8 (N, C, H, W) to uint8 (N, C, H', W')."""


class Threat(IntEnum):
    """What an attacker has besides the protected images that he attacks; each level has what those below it have."""

    T0 = 0
    T1 = 1
    T2 = 2
    T3 = 3
    T4 = 4
    T5 = 5
    T6 = 6

    @property
    def meaning(self) -> str:
        return (
            "nothing but protected images",
            "plain images of the same kind, unpaired",
            "the algorithm, with keys of his own",
            "some plain images and their protected ones under the victim's key",
            "protected versions of any images he chooses",
            "the protection itself, with gradients",
            "a generative model of such images",
        )[self]


class AttackError(RayppError):
    """An attack does not apply to this victim, or lacks what it needs."""


@dataclass(frozen=True)
class Access:
    """What an attacker may touch of a victim; None where he cannot.

    Attributes:
        shape: (C, H, W) of the plain images.
        protect: the victim's protection as an oracle (T4).
        pairs: plain and protected images under the victim's key, uint8 (N, C, H, W) and (N, C, H', W') (T3).
        gallery: plain images among which the originals may be, uint8 (M, C, H, W).
    """

    shape: tuple[int, int, int]
    protect: Map | None = None
    pairs: tuple[Tensor, Tensor] | None = None
    gallery: Tensor | None = None


class Attack(ABC):
    """One attack.

    Args:
        options: its validated options.
        access: what it may touch; :meth:`missing` says what it lacks.
        seed: sets everything random in it.
    """

    Options: ClassVar[type[Options]]
    threat: ClassVar[Threat]
    needs: ClassVar[tuple[str, ...]] = ()
    """Fields of :class:`Access` without which it cannot run."""
    note: str = ""
    """What it found out about the victim, in words, once it has prepared."""

    def __init__(self, options: Any, access: Access, *, seed: int = 0) -> None:
        self.options, self.access, self.seed = options, access, seed
        lacks = [need for need in self.needs if getattr(access, need) is None]
        if lacks:
            raise AttackError(f"attack {options.name} needs {' and '.join(lacks)}, which this victim does not give")

    @abstractmethod
    def prepare(self) -> None:
        """Do once what does not depend on the images attacked: recover a key, train a network.

        Raises:
            AttackError: it does not apply to this victim.
        """

    @abstractmethod
    def reconstruct(self, protected: Tensor) -> Tensor:
        """Estimate plain images uint8 (N, C, H, W) from protected ones uint8 (N, C, H', W')."""
