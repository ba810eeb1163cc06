"""The report's page in a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from browser import chromium

from raypp.attacks import ATTACKS
from raypp.evaluation.baselines import BLIND, NEAREST_IMAGE
from raypp.evaluation.reidentification import GALLERY_SIZES
from raypp.evaluation.report.render import _render_page
from raypp.evaluation.report.source import Source
from raypp.experiments.attack_scores import headline
from raypp.metrics.matchers import MATCHERS, OWN_SCORES


def wide_card() -> dict[str, Any]:
    """A scorecard of all attacks and baselines, with results of many digits."""
    rates = ["", "_top5", "_same_class", "_unseen", *(f"_of_{size}" for size in GALLERY_SIZES)]
    rates += [f"_{matcher}" for matcher in MATCHERS]
    means = {"accuracy": 1.0, "bits_identified": 13.3, "psnr": 60.0} | {f"reidentified{rate}": 1.0 for rate in rates}
    means |= dict.fromkeys(("ssim", "ssim_invariant", "ssim_lab", "lpips", "edges"), -0.123)
    scores = {name: {"mean": mean, "low": 0.998, "high": 1.0, "top_1_percent": -0.1} for name, mean in means.items()}
    done = {
        "status": "done", "threat": "T4", "threat_meaning": "pairs", "num_queries": 10_000, "num_gallery": 10_000,
        "lower_bound": True, "matcher": OWN_SCORES, "scores": scores, "reidentification_rate": 0.15,
    }  # fmt: skip
    attacks: dict[str, Any] = {name: dict(done) for name in ATTACKS}
    attacks["codebook"] = {"status": "does not apply", "threat": "T4", "note": "It gave 4,500 different images. " * 5}
    return {
        "target": "run", "label": "learned", "num_queries": 10_000, "num_gallery": 10_000,
        "num_attacker_images": 50_000, "accuracy": None, "reference_accuracy": None,
        "environment": {"hardware": "2 cores"}, "attacks": attacks,
        "baselines": dict.fromkeys((*BLIND, NEAREST_IMAGE), scores),
        **headline(attacks, at_chance=False),
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.browser
def test_all_tables_fit_into_1100_pixels(tmp_path: Path) -> None:
    page_file = tmp_path / "report.html"
    page_file.write_text(_render_page([Source(wide_card(), {}, {})], {}, [{}]))
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1100, "height": 900})
        page.goto(page_file.as_uri())
        page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
        widths = page.evaluate("[...document.querySelectorAll('.scroll')].map(e => [e.scrollWidth, e.clientWidth])")
    assert len(widths) == 3
    assert all(table <= visible for table, visible in widths), widths
