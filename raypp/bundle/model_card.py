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
    """What attacks recovered, as a section of the card."""
    verdict, reason = scorecard["verdict"], scorecard["verdict_reason"]
    lines = [
        LEAKAGE,
        "",
        f"Verdict: **{verdict or 'not measured'}**{f' ({reason})' if reason else ''}.",
        "",
        f"{scorecard['num_queries']:,} test images attacked, looked for among {scorecard['num_gallery']:,}.",
        "",
        "| attack | threat | originals found | SSIM | verdict |",
        "|---|---|---|---|---|",
    ]
    for name, attack in scorecard["attacks"].items():
        if attack["status"] != "done":
            lines.append(f"| {name} | {attack['threat']} | - | - | {attack['status']} |")
            continue
        scores, bound = attack["scores"], " (at least)" if attack["lower_bound"] else ""
        lines.append(
            f"| {name} | {attack['threat']} | {attack['reidentification_rate']:.1%}{bound} | {scores['ssim']['mean']:.3f} | "
            f"{attack['verdict']} |"
        )
    null = scorecard["baselines"].get("class mean") or scorecard["baselines"]["mean image"]
    lines += [
        "",
        f"Who never saw the protected image and knows at most the class gets SSIM {null['ssim']['mean']:.3f} and finds "
        f"{max(null[key]['mean'] for key in ('reidentified', 'reidentified_edges')):.2%}.",
        "",
    ]
    return "\n".join(lines)


def model_card(
    config: Config,
    classes: tuple[str, ...],
    image_size: tuple[int, int],
    guard: PlainImageDetector | None,
    metrics: dict[str, Any],
    environment: dict[str, Any],
) -> str:
    """The card as Markdown: what this is, what was measured, and what it does not promise."""
    test = metrics["test"]
    low, high = test["accuracy_interval"]
    error = chance_error(test, len(classes))
    similarity = test["ssim"]["mean"] if test["ssim"] else None
    lines = [
        f"# Model card: {config.protection.name} protection with {config.classifier.name}",
        "",
        f"Made by raypp {raypp.__version__} on {datetime.now(UTC).date()}.",
        "",
        *([f'<p style="color: red"><strong>Error: {error}.</strong></p>', ""] if error else []),
        "| | |",
        "|---|---|",
        f"| task | {len(classes)} classes: {', '.join(classes[:20])}{', ...' if len(classes) > 20 else ''} |",
        f"| images | {image_size[0]} x {image_size[1]}, {config.data.channels} channels, 8 bit |",
        f"| training data | source `{config.data.source.name}`, {metrics['num_train']:,} images |",
        f"| mode | {config.train.mode}, alpha {config.train.alpha}, {config.train.epochs} epochs, seed {config.seed} |",
        f"| feature network | {metrics['features']} |",
        f"| test accuracy after 8-bit rounding | {test['accuracy']:.2%} "
        f"(95% interval {low:.2%} to {high:.2%}, n = {test['num_images']:,}) |",
        f"| test accuracy without rounding | {test['accuracy_float']:.2%} |",
    ]
    if metrics.get("plain_test"):
        lines.append(f"| plain classifier, same data | {metrics['plain_test']['accuracy']:.2%} |")
    if similarity is not None:
        lines.append(f"| SSIM of protected to plain images | {similarity:.3f} on average |")
    bits = PROTECTIONS.get(config.protection.name).bits(config.protection)
    if bits is not None:
        lines.append(f"| what leaves the client of an image | {bits:.4g} bits at most |")
    if PROTECTIONS.get(config.protection.name).classifies(config.protection):
        lines.append("| who can tell its class | whoever sees the protected image: the public part classifies |")
    if guard is not None:
        lines.append(f"| plain images that the service refuses | {_share(guard.plain_refused)} |")
        lines.append(f"| protected images that it refuses by mistake | {_share(guard.protected_refused)} |")
    lines += [f"| hardware | {environment['hardware']} |", "", "## What this does not promise", ""]
    keyed = PROTECTIONS.get(config.protection.name).needs_key(config.protection)
    who = "whoever has the key, which every client has," if keyed else "whoever has the public part of this bundle"
    lines += [
        "A low SSIM between protected and plain images does not even say that a person sees nothing: look at the",
        "picture. It says **nothing** about an attacker who trains an inverse network on pairs of plain and protected",
        f"images, which {who} can make. {NOT_ATTACKED}",
    ]
    if not PROTECTIONS.get(config.protection.name).trained and config.protection.name != "plain":
        lines += ["", "This scheme is here to be compared with. Published attacks undo it; do not rely on it."]
    lines += [
        "",
        "Whoever re-encodes protected images (JPEG) or changes their size may destroy the classification:",
        "`raypp evaluate BUNDLE --jpeg 75` measures it.",
        "",
    ]
    if metrics.get("warnings"):
        lines += ["## Departures", "", *(f"- {w}" for w in metrics["warnings"]), ""]
    return "\n".join(lines)


def _share(rate: dict[str, Any]) -> str:
    low, high = rate["interval"]
    return f"{rate['share']:.2%} (95% interval {low:.2%} to {high:.2%}, n = {rate['num']:,})"
