"""T4: identify a protected image in a gallery by protecting the whole gallery.

It works on every deterministic protection, with or without a key, and needs no inversion. One output for many images
resists it: K different protected images distinguish at most K originals. Randomness per image makes it harder. Against
a random protection, the attack averages several protected versions of each candidate and filters the averages. Both
are ours; the filter is that of Wiener (1949) with the principal components of the averages.

Pixel-based encryption with a key per image maps a value ``v`` to ``v`` or ``255 - v`` at random (negative-positive
transformation), and may permute the colors of a pixel. The attack folds both values into one, as the feature
reconstruction of Chang, Case 2020 (arXiv 2004.13263), and sorts the colors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from raypp.attacks.base import PROTECT_BATCH_SIZE, Attack, Threat, required
from raypp.attacks.gallery_noise import (
    Candidates,
    CandidateScores,
    DistanceScores,
    LikelihoodScores,
    average_draws,
)
from raypp.metrics.matchers import OWN_SCORES
from raypp.metrics.retrieval import negative_distances
from raypp.utils.progress import StepCounter
from raypp.utils.registry import MethodConfig

MAX_CHANGED = 0.001  # share of values: a network's rounding differs between batch sizes


def _values(protected: Tensor) -> Tensor:
    return protected


def _folded(protected: Tensor) -> Tensor:
    return torch.minimum(protected, 255 - protected)


def _folded_and_sorted(protected: Tensor) -> Tensor:
    return _folded(protected).sort(dim=1).values


COMPARISONS: dict[str, Callable[[Tensor], Tensor]] = {
    "values": _values,
    "folded values": _folded,
    "folded values with sorted colors": _folded_and_sorted,
}
"""What is compared: functions of protected images uint8 (N, C, H, W) that keep the shape."""


class KnownGallery(Attack):
    """Returns the gallery image whose protected version is nearest.

    A protection is random if it maps equal images to different ones at another position of another batch. A protection
    that repeats its random numbers in each call is drawn at positions that no upload has. The attack then compares the
    values or the folded values, whichever identifies more of the attacker's own protected images. With stated noise it
    ranks candidates by the likelihood of the protected image.
    """

    cost: ClassVar[str] = (
        "Protects the whole gallery once, or `num_draws` times where the protection is random; it trains nothing."
    )

    class Options(MethodConfig):
        name: Literal["known_gallery"] = "known_gallery"
        num_draws: int = Field(16, ge=1)
        """Protected versions of each candidate that are averaged, for a random protection."""
        batch_size: int = Field(500, ge=1)
        """Gallery images per batch."""

    threat: ClassVar[Threat] = Threat.T4
    needs: ClassVar[tuple[str, ...]] = ("protect", "gallery")
    draws: ClassVar[bool] = False
    matcher: ClassVar[str] = OWN_SCORES

    def prepare(self) -> None:
        batches = required(self.access.gallery).split(self.options.batch_size)
        protect = required(self.access.protect)
        self._orders = torch.Generator().manual_seed(self.seed)
        self._first_position = 1
        trials = protect(batches[0])
        comparison = _comparison_without_randomness(trials, self._draw(batches[0]))
        is_random = comparison is None
        if comparison is None:
            if torch.equal(trials, protect(batches[0])):
                self._first_position = PROTECT_BATCH_SIZE
            draws = [self._draw(batches[0]) for _ in range(self.options.num_draws)]
            comparison = _best_comparison(trials, draws, self.seed)
        self._features = COMPARISONS[comparison]
        self._scores: CandidateScores | None = None
        self.note = f"{sum(map(len, batches)):,} candidates protected"
        if is_random:
            counter = self.count_steps("protecting candidates", len(batches) * self.options.num_draws)
            versions = ((self._counted_draw(b, counter) for _ in range(self.options.num_draws)) for b in batches)
            comparison, self._scores = self._choose_scores(comparison, average_draws(versions, self.seed), trials)
            self.note += f" {self.options.num_draws} times"
        else:
            self._protected = torch.cat([self._features(protect(batch)) for batch in batches])
        if comparison != "values":
            self.note += f", compared by {comparison}"

    def _draw(self, images: Tensor) -> Tensor:
        """Protect images in a random order, at positions of a batch from ``_first_position`` on."""
        order = torch.randperm(len(images), generator=self._orders)
        others = torch.arange(self._first_position) % len(images)
        batch = images[torch.cat((others, order)).to(images.device)]
        protected = required(self.access.protect)(batch)[self._first_position :]
        return protected[order.argsort().to(protected.device)]

    def _counted_draw(self, images: Tensor, counter: StepCounter) -> Tensor:
        counter.advance()
        return self._compared(self._draw(images))

    def _compared(self, protected: Tensor) -> Tensor:
        """Return the compared values (n, D) of protected images."""
        return self._features(protected).flatten(1)

    def _choose_scores(self, comparison: str, candidates: Candidates, trials: Tensor) -> tuple[str, CandidateScores]:
        """Return the name and the scores that identify most of the first candidates' protected versions."""
        scores: dict[str, CandidateScores] = {}
        if self.access.noise_std is not None and comparison == "values":
            scores["likelihood"] = LikelihoodScores(candidates, self.access.noise_std)
        scores[comparison] = DistanceScores(candidates)
        compared = self._compared(trials)
        best = max(scores, key=lambda name: _share_identified(scores[name], compared))
        return best, scores[best]

    def candidate_scores(self, protected: Tensor) -> Tensor:
        if self._scores is not None:
            return self._scores.rank(self._compared(protected))
        return negative_distances(self._features(protected), self._protected)

    def reconstruct(self, protected: Tensor) -> Tensor:
        return self.best_candidates(protected)


def _comparison_without_randomness(first: Tensor, second: Tensor) -> str | None:
    """Return the first comparison in which two protected versions of the same images are equal, if there is one.

    Folded values must differ between images: those of a random mask of 0 and 255 are all 0.
    """
    for name, features in COMPARISONS.items():
        values = features(first)
        changed = (values.int() - features(second).int()).abs() > 1
        if changed.float().mean() <= MAX_CHANGED and (features is _values or len(values.unique(dim=0)) > 1):
            return name
    return None


def _best_comparison(trials: Tensor, draws: list[Tensor], seed: int) -> str:
    """Return the comparison that identifies most of ``trials`` among the same images, protected again as ``draws``."""

    def rate(name: str) -> float:
        features = COMPARISONS[name]
        candidates = average_draws([[features(draw).flatten(1) for draw in draws]], seed)
        return _share_identified(DistanceScores(candidates), features(trials).flatten(1))

    return max(COMPARISONS, key=rate)


def _share_identified(scores: CandidateScores, protected: Tensor) -> float:
    """Share of protected images (n, D) whose best candidate is the one of the same index."""
    indices = torch.arange(len(protected), device=protected.device)
    return float((scores.rank(protected).argmax(1) == indices).float().mean())
