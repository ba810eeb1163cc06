"""Response schemas of the HTTP API."""

from __future__ import annotations

from typing import Any

from raypp.serve.problems import PROBLEM_RESPONSES

CLASSIFIED = {
    "model": "0123456789abcdef",
    "protection": "sha256 of the protection's manifest",
    "images": [
        {
            "class": "ship",
            "index": 8,
            "probability": 0.93,
            "top": [{"class": "ship", "index": 8, "probability": 0.93}],
        }
    ],
    "timing_ms": {"read": 0.4, "model": 6.1, "total": 6.5},
}
MODEL = {
    "version": "0123456789abcdef",
    "bundle": "first/bundle",
    "protection": "sha256 of the protection's manifest",
    "classes": ["airplane", "ship"],
    "upload": {"height": 32, "width": 32, "channels": 3, "bits": 8},
    "limits": {"body_bytes": 16777216, "images": 256},
    "accuracy": 0.75,
    "guard": {"plain_refused": {"share": 1.0}, "protected_refused": {"share": 0.0}},
    "scorecard": {
        "verdict": "broken",
        "verdict_reason": "",
        "strongest_attack": "inverse",
        "reidentification_rate": 0.8,
    },
    "rejected": None,
}
ATTACKS_OFFERED = {
    "model": "0123456789abcdef",
    "attacks": [
        {
            "attack": "inverse",
            "threat": "T4",
            "attacker_has": "protected versions of any images he chooses",
            "max_images": 32,
            "measured": {"verdict": "broken", "verdict_reason": "", "reidentification_rate": 0.8, "ssim": 0.6},
        }
    ],
    "baselines": {"mean image": {"ssim": 0.13, "reidentified": 0.0}},
    "rejected": None,
}
RECONSTRUCTED = {
    "attack": "inverse",
    "threat": "T4",
    "model": "0123456789abcdef",
    "reconstructions": [{"png": "iVBORw0KGgo=", "psnr": 18.4, "ssim": 0.74}],
    "timing_ms": {"total": 12.3},
}


def example_of(
    kind: str, schema: dict[str, Any], example: dict[str, Any] | None = None
) -> dict[int | str, dict[str, Any]]:
    content = {"schema": schema} | ({"example": example} if example is not None else {})
    found: dict[int | str, dict[str, Any]] = {200: {"description": "Done.", "content": {kind: content}}}
    return found | PROBLEM_RESPONSES


def response_of(example: dict[str, Any], *others: str) -> dict[int | str, dict[str, Any]]:
    content: dict[str, Any] = {"application/json": {"example": example, "schema": {"type": "object"}}}
    content |= {kind: {"schema": {"type": "string", "format": "binary"}} for kind in others}
    return {200: {"description": "Done.", "content": content}} | PROBLEM_RESPONSES
