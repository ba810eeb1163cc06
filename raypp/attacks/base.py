"""What every attack is: a threat level, what it needs of its victim, and reconstructions of protected images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor

from raypp.config.overrides import deep_merge
from raypp.config.schema import OptimizationConfig
from raypp.models.perceptual import StateDict
from raypp.training.task import Task
from raypp.utils.errors import RayppError
from raypp.utils.registry import MethodConfig

ImageMap = Callable[[Tensor], Tensor]
"""uint8 (N, C, H, W) to uint8 (N, C, H', W')."""


MOST_PADDING = 11  # pixels that blocks may fill a side up by; more is another size


class Threat(IntEnum):
    """What an attacker has besides the protected images that he attacks; each level has what those below it have."""

    T0 = 0
    T1 = 1
    T2 = 2
    T3 = 3
    T4 = 4
    T5 = 5

    @property
    def meaning(self) -> str:
        return (
            "nothing but protected images",
            "plain images of the same kind, unpaired",
            "the algorithm, with keys of his own",
            "some plain images and their protected ones under the victim's key",
            "protected versions of any images he chooses",
            "the protection itself, with gradients",
        )[self]


class AttackError(RayppError):
    """An attack does not apply to this victim, or lacks what it needs."""


@dataclass(frozen=True)
class AttackerKnowledge:
    """What an attacker may touch of a victim; None where he cannot.

    Attributes:
        shape: (C, H, W) of the plain images.
        structure: how protected images are made up, which who knows the algorithm knows: "none", "pixel" (values stay
            at their pixels), "block" or "shuffled_block", as the protection's adaptation network has it.
        images: plain images like the victim's that are not his, uint8 (N, C, H, W) (T1).
        labels: their classes, int64 (N,), and ``num_classes`` of them.
        ciphertexts: gives plain images uint8 (N, C, H, W) and their classes (N,), protected images uint8
            (M, C', H', W') of quite other originals and theirs (M,) (T1).
        fresh: the algorithm under a key of the attacker's own, one for each number (T2).
        pairs: plain and protected images under the victim's key, uint8 (N, C, H, W) and (N, C, H', W') (T3).
        protect: the victim's protection as an oracle (T4).
        gradients: the protection itself, float (N, C, H, W) in [0, 1] to the same, differentiable (T5).
        gallery: plain images among which the originals may be, uint8 (M, C, H, W).
        classify: the cloud's answer to protected images uint8, classes int64 (N,).
        earlier: trained networks of other attacks by their names, for those that build on them.
        device: where attacks compute.
    """

    shape: tuple[int, int, int]
    structure: str = "none"
    images: Tensor | None = None
    labels: Tensor | None = None
    num_classes: int = 0
    ciphertexts: Callable[[], tuple[Tensor, Tensor, Tensor, Tensor]] | None = None
    fresh: Callable[[int], ImageMap] | None = None
    pairs: tuple[Tensor, Tensor] | None = None
    protect: ImageMap | None = None
    gradients: ImageMap | None = None
    gallery: Tensor | None = None
    classify: ImageMap | None = None
    earlier: dict[str, ImageMap] | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


NEEDS = {
    "images": "plain images of the same kind",
    "ciphertexts": "protected images to learn from",
    "fresh": "an algorithm with keys",
    "pairs": "pairs of plain and protected images",
    "protect": "the protection as an oracle",
    "gradients": "a differentiable protection",
    "gallery": "a gallery of plain images",
    "classify": "the cloud's classifier",
}
"""Fields of :class:`Access` in words."""


def size_mismatch(protected: Sequence[int], plain: Sequence[int]) -> bool:
    """Whether protected images (H', W') have quite another size than plain ones (H, W), not only padding."""
    extra = [theirs - ours for theirs, ours in zip(protected, plain, strict=True)]
    return min(extra) < 0 or max(extra) > MOST_PADDING


def match_shape(images: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Images uint8 (N, C', H', W') in the shape (C, H, W) of plain ones: padding is cut, another size resized, grey
    repeated and colour averaged where the channels differ."""
    channels, height, width = shape
    if size_mismatch(images.shape[2:], (height, width)):
        resized = F.interpolate(images.float(), size=(height, width), mode="bilinear", antialias=True)
        images = resized.round().clamp(0, 255).to(torch.uint8)
    images = images[:, :, :height, :width]
    if images.shape[1] == channels:
        return images
    grey = images.float().mean(1, keepdim=True).round().to(torch.uint8)
    return grey.expand(-1, channels, -1, -1)


class Attack(ABC):
    """One attack.

    Args:
        options: its validated options.
        access: what it may touch.
        seed: sets everything random in it.
        learned: its network is trained already and will be loaded: it needs nothing to learn from.

    Raises:
        AttackError: ``access`` lacks what it needs.
    """

    Options: ClassVar[type[MethodConfig]]
    threat: ClassVar[Threat]
    needs: ClassVar[tuple[str, ...]] = ()
    """Fields of :class:`Access` without which it cannot run."""
    after: ClassVar[tuple[str, ...]] = ()
    """Attacks whose trained networks it builds on where they have been run."""
    draws: ClassVar[bool] = True
    """Whether it draws images that it has not seen; else it only picks one of those that it is given."""
    max_queries: int | None = None
    """Images that it takes on at most, where each one costs it much."""
    effort: str | None = None
    """An option that says how long it tries, where that is not a training; half of it is measured too."""
    note: str = ""
    """What it found out about the victim, in words, once it has prepared."""

    def __init__(self, options: Any, access: AttackerKnowledge, *, seed: int = 0, learned: bool = False) -> None:
        self.options, self.access, self.seed = options, access, seed
        if not learned and (lacks := self.lacking(access)):
            words = " and ".join(NEEDS[need] for need in lacks)
            raise AttackError(f"attack {options.name} needs {words}, which this victim does not give")

    @classmethod
    def lacking(cls, access: AttackerKnowledge) -> list[str]:
        """Fields that it needs and ``access`` does not give."""
        return [need for need in cls.needs if getattr(access, need) is None]

    @abstractmethod
    def prepare(self) -> None:
        """Do once what does not depend on the images attacked, such as recovering a key.

        Raises:
            AttackError: it does not apply to this victim.
        """

    @abstractmethod
    def reconstruct(self, protected: Tensor) -> Tensor:
        """Estimate plain images uint8 (N, C, H, W) from protected ones uint8 (N, C, H', W')."""


class TrainedOptions(MethodConfig):
    """Options of an attack that trains a network; what ``train`` leaves out keeps the attack's own default."""

    train: OptimizationConfig

    @model_validator(mode="before")
    @classmethod
    def _over_defaults(cls, given: Any) -> Any:
        train = given.get("train") if isinstance(given, dict) else None
        if not isinstance(train, dict):
            return given
        default: OptimizationConfig = cls.model_fields["train"].default
        return given | {"train": deep_merge(default.model_dump(mode="json"), train)}


class AttackTask(Task, Protocol):
    """A task whose batches workers can share."""

    def share(self, rank: int, world: int) -> None:
        """Take one worker's share of every batch."""


class TrainedAttack(Attack):
    """An attack that trains a network first; ``prepare`` is replaced by training and loading.

    The network trains in the project's own loop, so that it can stop, resume and spread as protections do:
    :meth:`task` gives what to train, and :meth:`load` takes what came of it.
    """

    @property
    def epochs(self) -> int:
        """Of its training at full effort."""
        found: int = self.options.train.epochs
        return found

    @property
    @abstractmethod
    def num_images(self) -> int:
        """Images that it has to learn from."""

    @abstractmethod
    def task(self, share_epochs: float = 1.0, num_images: int | None = None) -> AttackTask:
        """What the loop trains.

        Args:
            share_epochs: take this share of the epochs only.
            num_images: take only this many of the attacker's images, for as many steps.
        """

    @abstractmethod
    def state(self, trainee: Any) -> StateDict:
        """The weights of a trained task that reconstruct."""

    @abstractmethod
    def load(self, state: StateDict) -> None:
        """Take up weights that :meth:`state` gave."""

    def prepare(self) -> None:
        """Nothing to do: it is ready once it has loaded its weights."""
