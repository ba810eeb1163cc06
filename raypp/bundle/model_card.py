"""Text of the model card and of its section on leakage."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import raypp
from raypp.bundle.guard import PlainImageDetector
from raypp.bundle.manifest import LEAKAGE
from raypp.config.schema import Config
from raypp.metrics.statistics import chance_error
from raypp.protections import PROTECTIONS

NOT_ATTACKED = "No attack has been run on this bundle yet."


def leakage_card(scorecard: dict[str, Any]) -> str:
    """Attack results as a section of the model card."""
    verdict, reason = scorecard["verdict"], scorecard["verdict_reason"]
    rows = ["| attack | threat | re-identified | SSIM | verdict |", "|---|---|---|---|---|"]
    for name, attack in scorecard["attacks"].items():
        if attack["status"] != "done":
            rows.append(f"| {name} | {attack['threat']} | - | - | {attack['status']} |")
            continue
        rate = f"{attack['reidentification_rate']:.1%}{' (at least)' if attack['lower_bound'] else ''}"
        ssim = attack["scores"]["ssim"]["mean"]
        rows.append(f"| {name} | {attack['threat']} | {rate} | {ssim:.3f} | {attack['verdict']} |")
    baseline = scorecard["baselines"].get("class mean") or scorecard["baselines"]["mean image"]
    max_rate = max(baseline[key]["mean"] for key in ("reidentified", "reidentified_edges"))
    paragraphs = (
        LEAKAGE,
        f"Verdict: **{verdict or 'not measured'}**{f' ({reason})' if reason else ''}.",
        f"{scorecard['num_queries']:,} test images attacked; gallery of {scorecard['num_gallery']:,} images.",
        "\n".join(rows),
        "Baseline: an attacker without the protected image, who knows at most the class, gets SSIM "
        f"{baseline['ssim']['mean']:.3f} and re-identifies {max_rate:.2%}.\n",
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
    error = chance_error(metrics["test"], len(classes))
    shown_classes = f"{', '.join(classes[:20])}{', ...' if len(classes) > 20 else ''}"
    lines = [
        f"# Model card: {config.protection.name} protection with {config.classifier.name}",
        "",
        f"Made by raypp {raypp.__version__} on {datetime.now(UTC).date()}.",
        "",
        *([f'<p style="color: red"><strong>Error: {error}.</strong></p>', ""] if error else []),
        "| | |",
        "|---|---|",
        f"| task | {len(classes)} classes: {shown_classes} |",
        f"| images | {image_size[0]} x {image_size[1]}, {config.data.channels} channels, 8 bit |",
        f"| training data | source `{config.data.source.name}`, {metrics['num_train']:,} images |",
        f"| mode | {config.train.mode}, alpha {config.train.alpha}, {config.train.epochs} epochs, seed {config.seed} |",
        f"| feature network | {metrics['features']} |",
        *_accuracy_rows(metrics),
        *_privacy_rows(config, guard),
        f"| hardware | {environment['hardware']} |",
        "",
        *_limits(config),
    ]
    if metrics.get("warnings"):
        lines += ["## Departures", "", *(f"- {warning}" for warning in metrics["warnings"]), ""]
    return "\n".join(lines)


def _accuracy_rows(metrics: dict[str, Any]) -> list[str]:
    test = metrics["test"]
    low, high = test["accuracy_interval"]
    rows = [
        f"| test accuracy after 8-bit rounding | {test['accuracy']:.2%} "
        f"(95% interval {low:.2%} to {high:.2%}, n = {test['num_images']:,}) |",
        f"| test accuracy without rounding | {test['accuracy_float']:.2%} |",
    ]
    if metrics.get("plain_test"):
        rows.append(f"| plain classifier, same data | {metrics['plain_test']['accuracy']:.2%} |")
    if test["ssim"] and test["ssim"]["mean"] is not None:
        rows.append(f"| SSIM of protected to plain images | {test['ssim']['mean']:.3f} on average |")
    return rows


def _privacy_rows(config: Config, guard: PlainImageDetector | None) -> list[str]:
    protection = PROTECTIONS.get(config.protection.name)
    rows = []
    bits = protection.bits(config.protection)
    if bits is not None:
        rows.append(f"| information per protected image | {bits:.4g} bits at most |")
    if protection.classifies(config.protection):
        rows.append("| class | the public part classifies: everyone who sees a protected image can tell its class |")
    if guard is not None:
        rows.append(f"| plain images that the service refuses | {_share(guard.plain_refused)} |")
        rows.append(f"| protected images that it refuses by mistake | {_share(guard.protected_refused)} |")
    return rows


def _limits(config: Config) -> list[str]:
    protection = PROTECTIONS.get(config.protection.name)
    needs_key = protection.needs_key(config.protection)
    owners = "everyone who has the key (every client)" if needs_key else "everyone who has this bundle's public part"
    lines = [
        "## What this does not promise",
        "",
        "A low SSIM between protected and plain images does not even mean that a person sees nothing: look at the",
        "picture. It says **nothing** about an attacker who trains an inverse network on pairs of plain and protected",
        f"images. Such pairs can be made by {owners}. {NOT_ATTACKED}",
    ]
    if not protection.trained and config.protection.name != "plain":
        lines += ["", "This scheme is here for comparison. Published attacks undo it; do not rely on it."]
    return [
        *lines,
        "",
        "Re-encoding (JPEG) or resizing protected images may destroy the classification:",
        "`raypp evaluate BUNDLE --jpeg 75` measures it.",
        "",
    ]


def _share(rate: dict[str, Any]) -> str:
    low, high = rate["interval"]
    return f"{rate['share']:.2%} (95% interval {low:.2%} to {high:.2%}, n = {rate['num']:,})"
