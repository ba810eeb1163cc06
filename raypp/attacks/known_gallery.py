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

from raypp.attacks.base import Attack, Threat, required
from raypp.attacks.gallery_noise import (
    Candidates,
    CandidateScores,
    DistanceScores,
    LikelihoodScores,
    average_draws,
)
from raypp.utils.registry import MethodConfig

FINALISTS = 5


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

    A protection is random if it maps equal images to different ones. The attack then compares the values or the folded
    values, whichever identifies more of the attacker's own protected images. With stated noise it ranks candidates by
    the likelihood of the protected image.
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
    matcher: ClassVar[str] = "pixels"  # its estimates are images of the gallery

    def prepare(self) -> None:
        batches = required(self.access.gallery).split(self.options.batch_size)
        protect = required(self.access.protect)
        trials, draw = protect(batches[0]), protect(batches[0])
        comparison = _comparison_without_randomness(trials, draw)
        is_random = comparison is None
        if comparison is None:
            draws = [draw, *(protect(batches[0]) for _ in range(self.options.num_draws - 1))]
            comparison = _best_comparison(trials, draws, self.seed)
        self._features = COMPARISONS[comparison]
        self._scores: CandidateScores | None = None
        self.note = f"{sum(map(len, batches)):,} candidates protected"
        if is_random:
            versions = ((self._compared(protect(batch)) for _ in range(self.options.num_draws)) for batch in batches)
            comparison, self._scores = self._choose_scores(comparison, average_draws(versions, self.seed), trials)
            self.note += f" {self.options.num_draws} times"
        else:
            self._protected = torch.cat([self._compared(protect(batch)) for batch in batches])
            self._squared_norms = _center(self._protected).square().sum(1)
        if comparison != "values":
            self.note += f", compared by {comparison}"

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

    def reconstruct(self, protected: Tensor) -> Tensor:
        nearest = []
        for batch in self._compared(protected).split(self.options.batch_size):
            if self._scores is not None:
                nearest.append(self._scores.rank(batch).argmax(1))
                continue
            distance = self._squared_norms - 2 * _center(batch) @ _center(self._protected).t()
            # float32 cannot rank the very nearest; integers can.
            candidates = distance.topk(min(FINALISTS, len(self._squared_norms)), largest=False).indices
            exact = (self._protected[candidates].long() - batch[:, None].long()).square().sum(2)
            nearest.append(candidates.gather(1, exact.argmin(1, keepdim=True)).flatten())
        gallery = required(self.access.gallery)
        return gallery[torch.cat(nearest).to(gallery.device)].to(protected.device)


def _comparison_without_randomness(first: Tensor, second: Tensor) -> str | None:
    """Return the first comparison in which two protected versions of the same images are equal, if there is one."""
    equal = (name for name, features in COMPARISONS.items() if torch.equal(features(first), features(second)))
    return next(equal, None)


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


def _center(values: Tensor) -> Tensor:
    return (values.float() - 128) / 128
