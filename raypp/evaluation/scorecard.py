"""What attacks recover, beside what an attacker gets who never saw the protected image.

Every number is a mean over images with its 95% bootstrap interval, its quartiles and its worst 1%. What decides is
re-identification: how often the original is the nearest of the gallery's images to the reconstruction. Thresholds of 5%
and 20% are those of NeuraCrypt's authors (2021).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raypp.attacks.target import Target
from raypp.metrics.image import edge_correlation, edge_maps, in_parts, lpips, psnr, ssim, ssim_invariant, ssim_lab
from raypp.metrics.retrieval import reidentify
from raypp.metrics.statistics import bootstrap_interval

MAX_PSNR = 60.0  # dB: an exact reconstruction would make a mean infinite
AMBER, RED = 0.05, 0.20
MIN_QUERIES = 200  # attacked images; with fewer, chance alone moves a share across a threshold
RISE = 0.01  # of SSIM, and of the share found: a curve that rises by less between its last two points is flat
PART, JUDGED_PIXELS = 500, 2**21  # images that the judge reads at a time, at most, and their pixels
RATES = ("reidentified", "reidentified_edges", "reidentified_top5", "reidentified_same_class", "accuracy")
"""Metrics that are 0 or 1 for each image."""

INCONCLUSIVE = "inconclusive"
VERDICTS = ("holds", "weak", "broken", INCONCLUSIVE)

Scores = dict[str, Tensor]
"""Values (N,) of each metric, one per image."""
ReferenceClassifier = Callable[[Tensor], Tensor]
"""Classes int64 (N,) of plain images float in [0, 1]: a classifier that has nothing to do with the victim."""


@torch.inference_mode()
def score_images(estimates: Tensor, victim: Target, judge: nn.Module | None = None) -> Scores:
    """Compare reconstructions with the originals.

    Args:
        estimates: uint8 (n, C, H, W) of the victim's first n queries.
        judge: a classifier trained on plain images apart from the victim; None leaves ``accuracy`` out.
    """
    num = len(estimates)
    estimates = estimates.to(victim.plain.device)
    truth, labels = victim.truth[:num], victim.gallery_labels
    ranks = reidentify(estimates, victim.gallery, truth, labels)
    ranks_edges = reidentify(estimates, victim.gallery, truth, labels, _edges)
    parts = [
        _compare(*pair, judge if victim.classes else None)
        for pair in zip(in_parts(estimates), in_parts(victim.plain[:num]), strict=True)
    ]
    scores = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    predictions = scores.pop("predictions", None)
    scores |= {
        "reidentified": ranks.top(1),
        "reidentified_top5": ranks.top(5),
        "reidentified_edges": ranks_edges.top(1),
    }
    if victim.classes:
        scores["reidentified_same_class"] = (ranks.same_class == 0).float()
        if predictions is not None:
            scores["accuracy"] = (predictions == victim.labels[:num]).float()
    return {name: values.float().cpu() for name, values in scores.items()}


def _edges(images: Tensor) -> Tensor:
    return edge_maps(images.float() / 255)


def _compare(estimates: Tensor, originals: Tensor, judge: nn.Module | None) -> Scores:
    """Metrics of pairs of uint8 images (n, C, H, W), and the judge's ``predictions`` of the estimates."""
    made, originals = estimates.float() / 255, originals.float() / 255
    scores = {
        "psnr": psnr(made, originals).clamp_max(MAX_PSNR),
        "ssim": ssim(made, originals),
        "ssim_lab": ssim_lab(made, originals),
        "ssim_invariant": ssim_invariant(made, originals),
        "edges": edge_correlation(made, originals).float(),
    }
    if (distances := lpips(made, originals)) is not None:
        scores["lpips"] = distances
    if judge is not None:
        num_together = max(1, min(PART, JUDGED_PIXELS // made[0, 0].numel()))
        scores["predictions"] = torch.cat([judge(part).argmax(1) for part in made.split(num_together)])
    return scores


def aggregate(scores: Scores, seed: int = 0) -> dict[str, dict[str, float]]:
    """Numbers of each metric: mean and 95% interval; of those that are no shares also quartiles and the worst 1%."""
    found = {}
    for name, values in scores.items():
        low, high = bootstrap_interval(values.numpy(), seed=seed)
        numbers = {"mean": float(values.double().mean()), "low": low, "high": high}
        if name not in RATES:
            worst = 0.01 if name == "lpips" else 0.99  # a distance: the smaller, the more has leaked
            at = (("min", 0.0), ("q1", 0.25), ("median", 0.5), ("q3", 0.75), ("worst_1_percent", worst), ("max", 1.0))
            numbers |= {key: float(np.quantile(values.numpy(), q)) for key, q in at}
        found[name] = {key: round(number, 5) for key, number in numbers.items()}
    return found


@torch.inference_mode()
def baselines(victim: Target, seed: int = 0) -> dict[str, Tensor]:
    """What an attacker can say who never saw the protected image, and the protected image itself: uint8 (N, C, H, W).

    ``class mean`` knows the class, which the cloud does; ``nearest training image`` even knows the original and picks
    the most similar of the attacker's own images: a bound on what prior knowledge can give.
    """
    plain = victim.plain
    own = victim.access.images
    assert own is not None
    own = own.to(plain.device)
    mean = _mean(own)
    random = torch.Generator().manual_seed(seed)
    found = {
        "mean image": mean.expand(len(plain), *mean.shape),
        "random image": own[torch.randint(len(own), (len(plain),), generator=random).to(plain.device)],
    }
    labels = victim.access.labels
    if victim.classes and labels is not None:
        labels = labels.to(plain.device)
        means = [_mean(own, labels == c) if (labels == c).any() else mean for c in range(len(victim.classes))]
        found["class mean"] = torch.stack(means)[victim.labels]
    found["nearest training image"] = own[torch.cat([_nearest(part, own) for part in in_parts(plain)])]
    height, width = plain.shape[2:]
    protected = victim.protected[:, :, :height, :width]
    if protected.shape == plain.shape:
        found["protected image"] = protected
    return found


def _mean(images: Tensor, chosen: Tensor | None = None) -> Tensor:
    """The mean image uint8 (C, H, W) of images uint8 (N, C, H, W), or of those that ``chosen`` bool (N,) names."""
    chosen = torch.ones(len(images), dtype=torch.bool, device=images.device) if chosen is None else chosen
    total = torch.zeros(images.shape[1:], dtype=torch.float64, device=images.device)
    for part, mask in zip(in_parts(images), in_parts(chosen, images), strict=True):
        total += part[mask].sum(0, dtype=torch.float64)
    return (total / chosen.sum()).round().to(torch.uint8)


def _nearest(images: Tensor, others: Tensor) -> Tensor:
    """Index int64 (n,) of the one of ``others`` that is nearest to each image, both uint8."""
    queries = images.flatten(1).float()
    least = torch.full((len(images),), torch.inf, device=images.device)
    nearest = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    start = 0
    for part in in_parts(others):
        flat = part.flatten(1).float()
        distances, index = (flat.square().sum(1) - 2 * queries @ flat.t()).min(1)
        nearest = torch.where(distances < least, index + start, nearest)
        least = torch.minimum(least, distances)
        start += len(part)
    return nearest


def reidentification_rate(summary: dict[str, dict[str, float]]) -> float:
    """The share of originals that are found, by pixels or by edges, whichever finds more."""
    return max(summary["reidentified"]["mean"], summary["reidentified_edges"]["mean"])


def verdict(share: float, num_queries: int, *, lower_bound: bool, at_chance: bool) -> tuple[str, str]:
    """Return the verdict on one attack, and why it is ``inconclusive`` (empty for any other verdict).

    Args:
        share: share of originals that the attack re-identifies, 0 to 1.
        num_queries: number of attacked images.
        lower_bound: a stronger attack of the same kind may find more. That cannot rescue a broken protection, so
            ``broken`` stands.
        at_chance: the classifier reads nothing, see :func:`raypp.metrics.statistics.chance_error`.

    Returns:
        ``holds``, ``weak``, ``broken`` or ``inconclusive``, and the reason.
    """
    if at_chance:
        return INCONCLUSIVE, "the classifier's accuracy is at chance"
    if num_queries < MIN_QUERIES:
        return INCONCLUSIVE, f"{num_queries} images were attacked, a verdict needs {MIN_QUERIES}"
    if lower_bound and share <= RED:
        return INCONCLUSIVE, "its score is a lower bound: a stronger attack may find more"
    return ("holds" if share < AMBER else "weak" if share <= RED else "broken"), ""


def is_rising(curve: list[dict[str, float]]) -> bool:
    """Whether leakage rose by more than a hundredth between a curve's last two points."""
    last, before = curve[-1], curve[-2]
    return any(last[name] - before[name] > RISE for name in ("ssim_invariant", "reidentification_rate"))


def rank_key(attack: dict[str, Any]) -> tuple[float, float]:
    """What attacks that have run are ordered by: the share of originals found, then SSIM."""
    return attack["reidentification_rate"], attack["scores"]["ssim_invariant"]["mean"]


def strongest_attack(attacks: dict[str, dict[str, Any]]) -> str | None:
    """The attack that finds the most originals, of equal ones that with the largest SSIM; None where none has run."""
    ran = {name: a for name, a in attacks.items() if a["status"] == "done"}
    if not ran:
        return None
    return max(ran, key=lambda n: rank_key(ran[n]))
