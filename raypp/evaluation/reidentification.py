"""Re-identification of reconstructions, by the matcher that does best on the attacker's own images.

A choice on the queries would be optimistic. So the attacker selects the matcher on validation images, among a gallery
of the attacker's images. Attacks without validation images have a fixed matcher: ``Attack.matcher``. Matching attacks
rank the gallery themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from raypp.attacks.base import Attack, match_shape
from raypp.attacks.target import Target
from raypp.metrics.matchers import OWN_SCORES
from raypp.metrics.retrieval import RetrievalRanks, rank_by_scores, reidentify

GALLERY_SIZES = (100, 1000, 10_000)
"""Gallery sizes of the reported rates; those above the gallery's own size are left out."""


@dataclass(frozen=True)
class MatcherChoice:
    """An attack's matcher.

    Attributes:
        matcher: its name, or ``OWN_SCORES``.
        num_validation: number of validation images; 0 for a fixed matcher.
        validation_rates: re-identification rate on the validation images by matcher.
    """

    matcher: str
    num_validation: int
    validation_rates: dict[str, float]


def select_matcher(attack: Attack, target: Target) -> MatcherChoice:
    """Select the matcher with the largest re-identification rate on the attacker's validation images.

    Among equal rates, the bits identified decide, then the attack's fixed matcher. The gallery has as many images as
    that of the target, if the attacker has so many, and at most ``MAX_VAL_GALLERY``.
    """
    validation = attack.validation_images()
    if validation is None:
        return MatcherChoice(attack.matcher, 0, {})
    plain, protected = validation
    num = len(protected)
    gallery = plain[: max(num, len(target.gallery))].to(target.gallery.device)
    estimates = match_shape(attack.reconstruct(protected), target.access.shape).to(gallery.device)
    truth = torch.arange(num, device=gallery.device)
    one_class = torch.zeros(len(gallery), dtype=torch.int64, device=gallery.device)
    quality: dict[str, tuple[float, float, bool]] = {}
    for name, features in target.matchers.items():
        ranks = reidentify(estimates, gallery, truth, one_class, features)
        quality[name] = (float(ranks.top(1).mean()), float(ranks.bits_identified().mean()), name == attack.matcher)
    best = max(quality, key=lambda name: quality[name])
    return MatcherChoice(best, num, {name: round(rate, 5) for name, (rate, *_) in quality.items()})


def reidentification_scores(
    estimates: Tensor, target: Target, matcher: str, *, all_matchers: bool = True
) -> dict[str, Tensor]:
    """Re-identify the originals of estimates in the target's gallery.

    Args:
        estimates: uint8 (n, C, H, W), reconstructions of the target's first n queries.
        matcher: the matcher of all scores but ``reidentified_MATCHER``.
        all_matchers: also compute ``reidentified_MATCHER`` for each other matcher.

    Returns:
        values (n,) of each metric: shares, and ``bits_identified``; NaN for queries that a metric leaves out.
    """
    truth = target.truth[: len(estimates)]

    def rank(name: str) -> RetrievalRanks:
        return reidentify(estimates, target.gallery, truth, target.gallery_labels, target.matchers[name])

    ranks = rank(matcher)
    scores = _scores(ranks, target)
    for name in target.matchers:
        if name == matcher:
            scores[f"reidentified_{name}"] = ranks.top(1)
        elif all_matchers:
            scores[f"reidentified_{name}"] = rank(name).top(1)
    return scores


def candidate_reidentification_scores(attack: Attack, target: Target, num: int) -> dict[str, Tensor]:
    """Re-identify the first ``num`` originals by the scores of a matching attack; empty for other attacks.

    Returns:
        values (num,) as of :func:`reidentification_scores`, without ``reidentified_MATCHER``.
    """
    if attack.matcher != OWN_SCORES:
        return {}
    batches = attack.candidate_score_batches(target.protected[:num])
    return _scores(rank_by_scores(batches, target.truth[:num], target.gallery, target.gallery_labels), target)


def _scores(ranks: RetrievalRanks, target: Target) -> dict[str, Tensor]:
    hits = ranks.top(1)
    is_seen = target.is_seen[: len(hits)]
    scores = {
        "reidentified": hits,
        "reidentified_top5": ranks.top(5),
        "reidentified_unseen": torch.where(is_seen, torch.full_like(hits, torch.nan), hits),
    }
    if target.classes:
        scores["reidentified_same_class"] = ranks.top_in_class()
    for size in GALLERY_SIZES:
        if size <= ranks.num_gallery:
            scores[f"reidentified_of_{size}"] = ranks.top_in_gallery_of(size)
    return scores | {"bits_identified": ranks.bits_identified()}


def rates_by_gallery_size(scores: dict[str, dict[str, float]]) -> dict[int, float]:
    """The expected re-identification rate by gallery size, from aggregated scores of an attack or a baseline."""
    keys = {size: f"reidentified_of_{size}" for size in GALLERY_SIZES}
    return {size: scores[key]["mean"] for size, key in keys.items() if key in scores}
