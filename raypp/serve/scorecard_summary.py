"""Public parts of a bundle's scorecard."""

from __future__ import annotations

from typing import Any

SUMMARY_KEYS = (
    "verdict", "verdict_reason", "strongest_attack", "reidentification_rate", "num_queries", "num_gallery", "accuracy",
)  # fmt: skip
ATTACK_KEYS = ("threat", "status", "verdict", "verdict_reason", "reidentification_rate", "lower_bound")


def summarize_scorecard(scorecard: dict[str, Any] | None) -> dict[str, Any] | None:
    """Verdict, scores of every attack and baselines."""
    if scorecard is None:
        return None
    attacks = {name: summarize_attack(result) for name, result in scorecard["attacks"].items()}
    summary = {key: scorecard.get(key) for key in SUMMARY_KEYS}
    return summary | {"attacks": attacks, "baselines": baseline_scores(scorecard)}


def summarize_attack(result: dict[str, Any]) -> dict[str, Any]:
    """Threat level, verdict, re-identification rate and mean scores of one attack."""
    scores = result.get("scores") or {}
    return {key: result.get(key) for key in ATTACK_KEYS} | _means(scores, "ssim", "psnr", "edges")


def baseline_scores(scorecard: dict[str, Any] | None) -> dict[str, Any]:
    """Mean scores of guesses that use no protected image."""
    baselines = (scorecard or {}).get("baselines") or {}
    return {name: _means(scores, "ssim", "psnr", "edges", "reidentified") for name, scores in baselines.items()}


def _means(scores: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: scores[key]["mean"] for key in keys if key in scores}
