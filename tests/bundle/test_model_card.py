"""The model card's table of attacks."""

from __future__ import annotations

from typing import Any

from raypp.bundle.model_card import leakage_card
from raypp.experiments.attack_scores import headline


def finished(num_queries: int, rate: float) -> dict[str, Any]:
    """The result of an attack that re-identified a share of the images."""
    scores = {"reidentified": rate, "bits_identified": 2.0, "ssim": 0.25, "ssim_invariant": 0.25}
    intervals = {name: {"mean": mean, "low": mean, "high": mean} for name, mean in scores.items()}
    return {
        "status": "done", "threat": "T4", "num_queries": num_queries, "num_gallery": 1000, "lower_bound": False,
        "reidentification_rate": rate, "scores": intervals,
    }  # fmt: skip


def test_each_attack_has_its_own_number_of_images() -> None:
    attacks = {
        "inverse": finished(1500, 0.5),
        "white_box": finished(30, 0.1),
        "codebook": {"status": "does not apply", "threat": "T1"},
    }
    card = {
        "num_queries": 1500, "num_gallery": 1000, "attacks": attacks, "blind_baselines": ["mean image"],
        "baselines": {"mean image": {"ssim": {"mean": 0.1}, "reidentified": {"mean": 0.001}}},
        **headline(attacks, at_chance=False),
    }  # fmt: skip
    text = leakage_card(card)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    assert [dict(zip(rows[0], row, strict=True))["n"] for row in rows[1:]] == ["1,500", "30", "-"]
    assert "n: number of attacked test images." in text
    assert "1,500 test images attacked" not in text
    assert "re-identifies 0.10% of 1,500" in text
