"""The attack interface: a threat level, the knowledge an attack needs, and reconstructions of protected images."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from raypp.metrics.retrieval import query_batches
from raypp.utils.errors import RayppError
from raypp.utils.progress import ProgressListener, StepCounter
from raypp.utils.registry import MethodConfig

T = TypeVar("T")
Shape = tuple[int, int, int]
"""(C, H, W)."""
ImageMap = Callable[[Tensor], Tensor]
"""uint8 (N, C, H, W) to uint8 (N, C, H', W')."""

MAX_PADDING = 11  # pixels that blocks add to a side; a larger difference is another size
PROTECT_BATCH_SIZE = 500
MAX_VAL = 1000  # validation images, which are some of the attacker's own
MAX_VAL_GALLERY = 10_000  # of the attacker's images, among which the validation images are re-identified


class Threat(Enum):
    """Knowledge of an attacker besides the attacked images; each level includes those below it."""

    T0 = "nothing but protected images"
    T1 = "plain images of the same kind, unpaired"
    T2 = "the algorithm, with the attacker's own keys"
    T3 = "some plain images and their protected ones under the target's key"
    T4 = "protected versions of images of the attacker's choice"
    T5 = "the protection itself, with gradients"

    def __init__(self, meaning: str) -> None:
        self.meaning = meaning


class AttackError(RayppError):
    """An attack does not apply to a target, or lacks knowledge that it needs."""


@dataclass(frozen=True)
class AttackerKnowledge:
    """Everything an attacker may use against a target; None where it is not available.

    Attributes:
        shape: (C, H, W) of the plain images.
        structure: structure of protected images, known with the algorithm: "none", "pixel" (values stay at their
            pixels), "block" or "shuffled_block", as the name of the protection's adaptation network.
        images: plain images like the target's, but not the target's own, uint8 (N, C, H, W) (T1).
        labels: their classes, int64 (N,), in [0, ``num_classes``).
        ciphertexts: returns half of ``images`` and their classes, then protected images uint8 (M, C', H', W') of the
            other half and their classes (M,) (T1).
        fresh: returns the algorithm under a key of the attacker, a different one for each number (T2).
        pairs: plain and protected images under the target's key, uint8 (N, C, H, W) and (N, C, H', W') (T3).
        protect: the target's protection as an oracle (T4).
        noise_std: standard deviation in gray levels of Gaussian noise that the protection states, see
            :func:`raypp.attacks.statements.stated_noise_std` (T4).
        gradients: the differentiable protection, from and to float (N, C, H, W) in [0, 1] (T5).
        logits: the same before the sigmoid that ends it, to float without bounds (T5).
        gallery: plain images that may contain the originals, uint8 (M, C, H, W).
        classify: the cloud's classifier, from protected images uint8 to classes int64 (N,).
        earlier: trained networks of other attacks by name.
        device: device of the attack's computations.
    """

    shape: Shape
    structure: str = "none"
    images: Tensor | None = None
    labels: Tensor | None = None
    num_classes: int = 0
    ciphertexts: Callable[[], tuple[Tensor, Tensor, Tensor, Tensor]] | None = None
    fresh: Callable[[int], ImageMap] | None = None
    pairs: tuple[Tensor, Tensor] | None = None
    protect: ImageMap | None = None
    noise_std: float | None = None
    gradients: ImageMap | None = None
    logits: ImageMap | None = None
    gallery: Tensor | None = None
    classify: ImageMap | None = None
    earlier: dict[str, ImageMap] | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def has_oracle(self) -> bool:
        """Whether the attacker can protect images, under any key."""
        return self.protect is not None or self.fresh is not None

    def with_images(self, images: Tensor, labels: Tensor) -> AttackerKnowledge:
        """Return the knowledge with other ``images``, ``labels`` and ``ciphertexts``; it needs ``protect``."""
        protect, half = required(self.protect), len(images) // 2

        def ciphertexts() -> tuple[Tensor, Tensor, Tensor, Tensor]:
            return images[:half], labels[:half], protect_in_batches(protect, images[half:]), labels[half:]

        return replace(self, images=images, labels=labels, ciphertexts=ciphertexts)


KNOWLEDGE_DESCRIPTIONS = {
    "images": "plain images of the same kind",
    "ciphertexts": "protected images to learn from",
    "fresh": "an algorithm with keys",
    "pairs": "pairs of plain and protected images",
    "protect": "the protection as an oracle",
    "gradients": "a differentiable protection",
    "gallery": "a gallery of plain images",
    "classify": "the cloud's classifier",
}
"""Fields of :class:`AttackerKnowledge` in words."""


def size_mismatch(protected: Sequence[int], plain: Sequence[int]) -> bool:
    """Whether protected images (H', W') differ from plain ones (H, W) by more than padding."""
    padding = [size - plain_size for size, plain_size in zip(protected, plain, strict=True)]
    return min(padding) < 0 or max(padding) > MAX_PADDING


def match_shape(images: Tensor, shape: Shape) -> Tensor:
    """Convert images uint8 (N, C', H', W') to the shape (C, H, W) of plain ones.

    Padding is cut, and images of another size are resized. Where the channels differ, color is averaged to gray.
    """
    channels, height, width = shape
    if size_mismatch(images.shape[2:], (height, width)):
        resized = F.interpolate(images.float(), size=(height, width), mode="bilinear", antialias=True)
        images = resized.round().clamp(0, 255).to(torch.uint8)
    images = images[:, :, :height, :width]
    if images.shape[1] == channels:
        return images
    gray = images.float().mean(1, keepdim=True).round().to(torch.uint8)
    return gray.expand(-1, channels, -1, -1)


def protect_in_batches(protect: ImageMap, images: Tensor) -> Tensor:
    return torch.cat([protect(batch) for batch in images.split(PROTECT_BATCH_SIZE)])


def tensor_sha256(*tensors: Tensor) -> str:
    """The SHA-256 of the tensors' bytes, one after the other."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def shuffle_indices(num: int, seed: int) -> Tensor:
    """Return a random order int64 (num,) of the attacker's images, which begins with the validation images.

    Attacks of one seed share the order, so that one attack's validation images are no training images of another.
    """
    return torch.randperm(num, generator=torch.Generator().manual_seed(seed))


def count_validation_images(num: int) -> int:
    """Return the number of validation images among ``num``: a tenth, at least 1 and at most ``MAX_VAL``."""
    return min(MAX_VAL, max(1, num // 10))


def required(value: T | None) -> T:
    """Return a field of :class:`AttackerKnowledge` that the attack's ``needs`` guarantee."""
    assert value is not None
    return value


class Attack(ABC):
    """An attack on protected images.

    Args:
        options: its validated options.
        access: the attacker's knowledge.
        seed: seed of all its random numbers.
        learned: its network is trained already and will be loaded, so it needs no knowledge to train.

    Raises:
        AttackError: ``access`` lacks what it needs.
    """

    Options: ClassVar[type[MethodConfig]]
    threat: ClassVar[Threat]
    needs: ClassVar[tuple[str, ...]] = ()
    """Required fields of :class:`AttackerKnowledge`."""
    after: ClassVar[tuple[str, ...]] = ()
    """Attacks whose trained networks it uses if they are available."""
    draws: ClassVar[bool] = True
    """Whether it reconstructs images; otherwise it only picks one of a gallery."""
    max_queries: int | None = None
    """Most images that it attacks, where each one is expensive; available after :meth:`prepare`, and of an attack that
    trains a network after :meth:`TrainedAttack.load`."""
    effort: str | None = None
    """The option that sets its number of steps, if it trains no network; half of it is measured too."""
    cost: ClassVar[str] = "One pass over the protected images; it trains nothing."
    """Its computation, for the reference page."""
    matcher: ClassVar[str] = "cosine"
    """The matcher of its estimates (:mod:`raypp.metrics.matchers`) if it has no validation images; ``OWN_SCORES`` of an
    attack with :meth:`candidate_scores`."""
    max_validation: ClassVar[int] = 0
    """Most of the attacker's images that it attacks to select its matcher; see :meth:`validation_images`. 0 below T4,
    where the attacker cannot protect images under the target's key."""
    extra_scores: ClassVar[dict[str, str]] = {}
    """Descriptions of the scores that :meth:`measure` returns, by name."""
    note: str = ""
    """A summary of its result on the target, available after :meth:`prepare`."""
    listener: ProgressListener = ProgressListener()
    """Receives the progress of :meth:`prepare` and :meth:`reconstruct`, and may stop them."""

    def __init__(self, options: Any, access: AttackerKnowledge, *, seed: int = 0, learned: bool = False) -> None:
        access = self.used_knowledge(options, access)
        self.options, self.access, self.seed = options, access, seed
        if not learned and (missing := self.lacking(access)):
            words = " and ".join(KNOWLEDGE_DESCRIPTIONS[need] for need in missing)
            raise AttackError(f"attack {options.name} needs {words}, which this target does not provide")

    @classmethod
    def used_knowledge(cls, options: Any, access: AttackerKnowledge) -> AttackerKnowledge:
        """Return ``access`` without fields that these options leave unused, which set the threat level."""
        return access

    @classmethod
    def lacking(cls, access: AttackerKnowledge) -> list[str]:
        """Required fields that are missing in ``access``."""
        return [need for need in cls.needs if getattr(access, need) is None]

    def count_steps(self, phase: str, total: int) -> StepCounter:
        """Count ``total`` steps of :meth:`prepare` or :meth:`reconstruct` for ``listener``."""
        return StepCounter(self.listener, phase, total)

    def prepare(self) -> None:  # noqa: B027
        """Do the work that does not depend on the attacked images, such as recovering a key.

        Raises:
            AttackError: it does not apply to this target.
        """

    def validation_images(self) -> tuple[Tensor, Tensor] | None:
        """Return images of the attacker to select its matcher, no pairs of which it trained on; None without them.

        The attack needs ``max_validation`` and the protection as an oracle.

        Returns:
            a gallery of plain images uint8 (M, C, H, W), and the protected versions uint8 (N, C', H', W') of its first
            N images.
        """
        images, protect = self.access.images, self.access.protect
        if not self.max_validation or images is None or protect is None:
            return None
        gallery = images[shuffle_indices(len(images), self.seed)[:MAX_VAL_GALLERY].to(images.device)]
        num = min(count_validation_images(len(images)), self.max_validation)
        return gallery, protect_in_batches(protect, gallery[:num])

    @abstractmethod
    def reconstruct(self, protected: Tensor) -> Tensor:
        """Estimate plain images uint8 (N, C, H, W) from protected ones uint8 (N, C', H', W')."""

    def candidate_scores(self, protected: Tensor) -> Tensor | None:
        """Return the scores of the gallery's images that a matching attack ranks them by, (n, M); else None.

        Args:
            protected: uint8 (n, C', H', W'), few enough for n * M scores in memory.

        Returns:
            the larger, the more probable is the gallery's image as the original.
        """
        return None

    def candidate_score_batches(self, protected: Tensor) -> Iterator[Tensor]:
        """Yield :meth:`candidate_scores` of protected images uint8 (N, C', H', W') in batches, in bounded memory."""
        for batch in query_batches(protected, len(required(self.access.gallery))):
            yield required(self.candidate_scores(batch))

    def best_candidates(self, protected: Tensor) -> Tensor:
        """Return the image of the gallery with the largest :meth:`candidate_scores` for each protected image."""
        scores = (batch.nan_to_num(-torch.inf) for batch in self.candidate_score_batches(protected))
        best = torch.cat([batch.argmax(1) for batch in scores])
        gallery = required(self.access.gallery)
        return gallery[best.to(gallery.device)].to(protected.device)

    def measure(self, plain: Tensor, protected: Tensor, truth: Tensor) -> dict[str, Tensor]:
        """Return the values (N,) of ``extra_scores``, which do not compare estimates with originals.

        Args:
            plain: originals uint8 (N, C, H, W).
            protected: their protected versions uint8 (N, C', H', W').
            truth: indices of the originals in the gallery, int64 (N,).
        """
        return {}
