"""Text of the model card, from ``model_card.md.j2``, and of its section on leakage."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

import raypp
from raypp.bundle.guard import PlainImageDetector
from raypp.config.schema import Config
from raypp.metrics.cost import describe_cost, describe_gain
from raypp.metrics.statistics import chance_error
from raypp.protections import PROTECTIONS

LEAKAGE = "## What attacks recovered"
NOT_ATTACKED = "No attack has been run on this bundle yet."


def leakage_card(scorecard: dict[str, Any]) -> str:
    """Attack results as a section of the model card."""
    verdict, reason = scorecard["verdict"], scorecard["verdict_reason"]
    rows = ["| attack | threat | n | re-identified | bits | SSIM | verdict |", "|---|---|---|---|---|---|---|"]
    for name, attack in scorecard["attacks"].items():
        if attack["status"] != "done":
            rows.append(f"| {name} | {attack['threat']} | - | - | - | - | {attack['status']} |")
            continue
        rate = f"{attack['reidentification_rate']:.1%}{' (at least)' if attack['lower_bound'] else ''}"
        bits, ssim = (attack["scores"][key]["mean"] for key in ("bits_identified", "ssim"))
        cells = (name, attack["threat"], f"{attack['num_queries']:,}", rate, f"{bits:.1f}", f"{ssim:.3f}")
        rows.append(f"| {' | '.join(cells)} | {attack['verdict']} |")
    blind = [scorecard["baselines"][name] for name in scorecard["blind_baselines"]]
    max_ssim, max_rate = (max(scores[key]["mean"] for scores in blind) for key in ("ssim", "reidentified"))
    num_gallery = scorecard["num_gallery"]
    strongest = scorecard["attacks"].get(scorecard["strongest_attack"])
    if strongest is not None:
        num_gallery = strongest["num_gallery"]
    paragraphs = (
        LEAKAGE,
        f"Verdict: **{verdict or 'not measured'}**{f' ({reason})' if reason else ''} in a gallery of {num_gallery:,} "
        "images. A larger gallery lowers the rates.",
        "\n".join(rows),
        "n: number of attacked test images.",
        f"Bits: mean of log2 {num_gallery:,} - log2(rank of the original), with rank 1 for the nearest.",
        "Baseline: an attacker without the protected image, who knows at most the class, gets SSIM "
        f"{max_ssim:.3f} and re-identifies {max_rate:.2%} of {scorecard['num_queries']:,} test images.\n",
        *([f"{describe_gain(scorecard['client'])}\n"] if scorecard.get("client") else []),
    )
    return "\n\n".join(paragraphs)


def model_card(
    config: Config,
    classes: tuple[str, ...],
    image_size: tuple[int, int],
    guard: PlainImageDetector | None,
    metrics: dict[str, Any],
    environment: dict[str, Any],
) -> str:
    """The model card as Markdown: description, measurements and limits."""
    templates = Environment(
        loader=PackageLoader("raypp.bundle", "."),
        trim_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    return templates.get_template("model_card.md.j2").render(
        config=config,
        protection=PROTECTIONS.get(config.protection.name),
        classes=classes,
        image_size=image_size,
        guard=guard,
        metrics=metrics,
        test=metrics["test"],
        environment=environment,
        version=raypp.__version__,
        date=datetime.now(UTC).date(),
        error=chance_error(metrics["test"], len(classes)),
        not_attacked=NOT_ATTACKED,
        share=_share,
        describe_cost=describe_cost,
        describe_gain=describe_gain,
    )


def _share(share: float, interval: Sequence[float], num: int) -> str:
    return f"{share:.2%} (95% interval {interval[0]:.2%} to {interval[1]:.2%}, n = {num:,})"
