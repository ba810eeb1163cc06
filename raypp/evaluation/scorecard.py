"""Scores and verdicts of attacks.

The verdict depends on the re-identification rate: how often the original is the gallery image nearest to the
reconstruction. It holds for the size of that gallery. The thresholds of 5% and 20% are those of NeuraCrypt's authors
(2021).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raypp.attacks.target import Target
from raypp.data.loader import inference_batch_size
from raypp.evaluation.reidentification import reidentification_scores
from raypp.metrics.image import MAX_PSNR, edge_correlation, finite_psnr, in_parts, lpips, ssim, ssim_invariant, ssim_lab
from raypp.metrics.matchers import OWN_SCORES
from raypp.metrics.statistics import bootstrap_interval, mean_interval, wilson_interval

WEAK_RATE, BROKEN_RATE = 0.05, 0.20
MIN_QUERIES = 200  # attacked images that ``holds`` and ``weak`` need
MIN_RISE = 0.01  # of SSIM or re-identification rate, between the last two points of a rising curve
DIGITS = 5  # decimals of scores
RATES = ("reidentified", "accuracy")
"""First words of the names of metrics that are shares: 0, 1 or a probability for each image."""
AREAS = "linkage_auc"
"""First words of the names of areas under ROC curves, which are in [0, 1]; contributions of images may lie outside."""
RANGES = {AREAS: (0.0, 1.0), "psnr": (0.0, MAX_PSNR), "ssim": (-1.0, 1.0), "edges": (-1.0, 1.0)}
"""Ranges of means by the first words of the metrics' names; ``bits_identified`` reaches log2 of the gallery's size."""

BROKEN, INCONCLUSIVE = "broken", "inconclusive"

Scores = dict[str, Tensor]
"""Values (N,) of each metric, one per image."""


@torch.inference_mode()
def score_images(
    estimates: Tensor,
    target: Target,
    reference_classifier: nn.Module | None = None,
    *,
    matcher: str,
    all_matchers: bool = True,
) -> Scores:
    """Compare reconstructions with the originals.

    Args:
        estimates: uint8 (n, C, H, W), reconstructions of the target's first n queries.
        reference_classifier: trained on plain images, independent of the target; None omits ``accuracy``.
        matcher: the matcher of the re-identification rate, see
            :func:`raypp.evaluation.reidentification.select_matcher`; with ``OWN_SCORES`` the re-identification is left
            to :func:`raypp.evaluation.reidentification.candidate_reidentification_scores`.
        all_matchers: also re-identify by the other matchers.
    """
    num = len(estimates)
    estimates = estimates.to(target.plain.device)
    batches = zip(in_parts(estimates), in_parts(target.plain[:num]), strict=True)
    parts = [_compare(*batch, reference_classifier if target.classes else None) for batch in batches]
    scores = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    predictions = scores.pop("predictions", None)
    if matcher != OWN_SCORES:
        scores |= reidentification_scores(estimates, target, matcher, all_matchers=all_matchers)
    if predictions is not None:
        scores["accuracy"] = (predictions == target.labels[:num]).float()
    return {name: values.float().cpu() for name, values in scores.items()}


def _compare(estimates: Tensor, originals: Tensor, reference_classifier: nn.Module | None) -> Scores:
    """Metrics of pairs of uint8 images (n, C, H, W), and the classifier's ``predictions`` of the estimates."""
    estimates, originals = estimates.float() / 255, originals.float() / 255
    scores = {
        "psnr": finite_psnr(estimates, originals),
        "ssim": ssim(estimates, originals),
        "ssim_lab": ssim_lab(estimates, originals),
        "ssim_invariant": ssim_invariant(estimates, originals),
        "edges": edge_correlation(estimates, originals).float(),
    }
    if (distances := lpips(estimates, originals)) is not None:
        scores["lpips"] = distances
    if reference_classifier is not None:
        batch_size = inference_batch_size(estimates.permute(0, 2, 3, 1))
        predictions = [reference_classifier(batch).argmax(1) for batch in estimates.split(batch_size)]
        scores["predictions"] = torch.cat(predictions)
    return scores


def aggregate(scores: Scores, num_gallery: int, seed: int = 0) -> dict[str, dict[str, float]]:
    """Mean and 95% interval of each metric over ``num`` images: Wilson's for shares, the bootstrap's for other means.

    See :func:`raypp.metrics.statistics.mean_interval` for values that (almost) all lie at a bound of their range. The
    ends of intervals are rounded outward. Other metrics than shares and areas also have quartiles, range and the limit
    of the top 1%. NaN values are left out, and so are metrics without another value.

    Args:
        scores: values of each metric.
        num_gallery: number of images in the gallery, which bounds ``bits_identified``.
        seed: seed of the bootstrap.
    """
    summary = {}
    for name, all_values in scores.items():
        values = all_values[~all_values.isnan()]
        if len(values) == 0:
            continue
        is_share, is_area = name.startswith(RATES), name.startswith(AREAS)
        if is_share:
            low, high = wilson_interval(float(values.double().sum()), len(values))
        elif (bounds := _range_of(name, num_gallery)) is not None:
            low, high = mean_interval(values.numpy(), *bounds, seed=seed)
        else:
            low, high = bootstrap_interval(values.numpy(), seed=seed)
        numbers = {"mean": float(values.double().mean()), "low": _floor(low), "high": -_floor(-high)}
        if not (is_share or is_area):
            top = 0.01 if name == "lpips" else 0.99  # LPIPS is a distance: small values mean leakage
            levels = {"min": 0.0, "q1": 0.25, "median": 0.5, "q3": 0.75, "top_1_percent": top, "max": 1.0}
            numbers |= {key: float(np.quantile(values.numpy(), level)) for key, level in levels.items()}
        summary[name] = {"num": len(values)} | {key: round(number, DIGITS) for key, number in numbers.items()}
    return summary


def _range_of(name: str, num_gallery: int) -> tuple[float, float] | None:
    """Return the range of a metric's mean; None if it has none."""
    if name == "bits_identified":
        return (0.0, math.log2(num_gallery)) if num_gallery > 1 else None
    return next((bounds for words, bounds in RANGES.items() if name.startswith(words)), None)


def _floor(value: float) -> float:
    """Round down to ``DIGITS`` decimals, except a rounding error of ``value``."""
    scale = 10.0**DIGITS
    return math.floor(round(value * scale, 6)) / scale


def verdict(rate: dict[str, float], num_queries: int, *, lower_bound: bool, at_chance: bool) -> tuple[str, str]:
    """Return the verdict on one attack, and the reason if it is ``inconclusive`` (else an empty string).

    Args:
        rate: re-identification rate, 0 to 1: ``mean``, and ``low`` and ``high`` of its interval.
        num_queries: number of attacked images.
        lower_bound: a stronger attack of the same kind may re-identify more; ``broken`` stays ``broken``.
        at_chance: the classifier is at chance, see :func:`raypp.metrics.statistics.chance_error`.
    """
    if at_chance:
        return INCONCLUSIVE, "the classifier's accuracy is at chance"
    if rate["low"] > BROKEN_RATE:
        return BROKEN, ""
    if num_queries < MIN_QUERIES:
        return INCONCLUSIVE, f"{num_queries} images were attacked, a verdict needs {MIN_QUERIES}"
    if rate["mean"] > BROKEN_RATE:
        return BROKEN, ""
    if lower_bound:
        return INCONCLUSIVE, "its score is a lower bound: a stronger attack may re-identify more"
    if rate["mean"] < WEAK_RATE <= rate["high"]:
        return INCONCLUSIVE, f"its interval reaches {rate['high']:.1%}, and the verdict holds needs less than 5%"
    return ("holds" if rate["mean"] < WEAK_RATE else "weak"), ""


def is_rising(curve: list[dict[str, float]]) -> bool:
    """Whether leakage rises by more than ``MIN_RISE`` between a curve's last two points."""
    before, last = curve[-2:]
    return any(last[name] - before[name] > MIN_RISE for name in ("ssim_invariant", "reidentification_rate"))


def rank_key(attack: dict[str, Any]) -> tuple[float, float]:
    """Sort key of finished attacks in galleries of one size: re-identification rate, then SSIM.

    The lower ends of their 95% intervals count, so that an attack on few images is not the strongest by chance.
    """
    scores = attack["scores"]
    return scores["reidentified"]["low"], scores["ssim_invariant"]["low"]


def strongest_attack(attacks: dict[str, dict[str, Any]]) -> str | None:
    """Name of the finished attack with the largest :func:`rank_key`; None if no attack is finished."""
    finished = [name for name, attack in attacks.items() if attack["status"] == "done"]
    return max(finished, key=lambda name: rank_key(attacks[name]), default=None)


def format_extra_score(name: str, score: dict[str, float]) -> str:
    """The mean of an attack's extra score and its 95% interval in words; shares in percent."""
    spec = ".1%" if name.startswith(RATES) else ".3f"
    return f"{score['mean']:{spec}} ({score['low']:{spec}} to {score['high']:{spec}})"
