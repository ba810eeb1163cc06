"""Write the report: one HTML page that needs no network, the figures as PNG, and the numbers as CSV and JSON."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

import raypp
from raypp.evaluation.baselines import BASELINE_MATCHER
from raypp.evaluation.output import as_csv
from raypp.evaluation.reidentification import GALLERY_SIZES
from raypp.evaluation.report import figures
from raypp.evaluation.report.front import accuracy_leakage_front, has_front
from raypp.evaluation.report.source import Source, read_source
from raypp.evaluation.scorecard import format_extra_score
from raypp.metrics.cost import describe_cost, describe_gain
from raypp.metrics.matchers import MATCHERS
from raypp.utils.errors import ConfigError, StorageError
from raypp.utils.paths import short_name
from raypp.utils.storage import Storage

COLUMNS = (
    "target", "attack", "threat", "status", "num_queries", "num_gallery", "reidentification_rate", "matcher", "verdict",
    "verdict_reason", "lower_bound", "metric", "mean", "low", "high", "median", "top_1_percent", "max",
)  # fmt: skip

Pngs = dict[str, bytes]
"""PNG files by name."""


def write_report(sources: Sequence[str], target: Storage) -> dict[str, Any]:
    """Write ``report.html``, ``report.json``, ``report.csv`` and the figures; returns the content of ``report.json``.

    Args:
        sources: paths or URIs of attack runs, attacked bundles, or runs with an attacked bundle.

    Raises:
        ConfigError: there is no source, or a source holds no scorecard.
        StorageError: the target cannot be written.
    """
    if not sources:
        raise ConfigError("no source is given; name attack runs, or bundles that were attacked")
    loaded = [read_source(source) for source in sources]
    if not target.exists("report.json") and not target.exists("scorecard.json") and target.names():
        raise StorageError(f"{target.uri} holds other files; give a new or empty folder, or one of an earlier report")
    shared = {"protected": figures.protected_tiles(loaded)}
    if has_front(loaded):
        shared["front"] = accuracy_leakage_front(loaded)
    by_source = [_render_figures(source) for source in loaded]
    html = _render_page(loaded, shared, by_source)
    numbered = {f"{name}_{i}": png for i, pngs in enumerate(by_source, 1) for name, png in pngs.items()}
    for name, png in (shared | numbered).items():
        target.write(f"figures/{name}.png", png)
    summary = {"targets": [source.card for source in loaded]}
    target.write("report.csv", as_csv(COLUMNS, (row for source in loaded for row in _csv_rows(source.card))))
    target.write("report.json", (json.dumps(summary, indent=1) + "\n").encode())
    target.write("report.html", html.encode())
    return summary


def _render_figures(source: Source) -> Pngs:
    """The figures of one source."""
    curves = figures.convergence_figure(source)
    return {
        "estimates": figures.estimate_tiles(source),
        "boxes": figures.score_boxes(source),
        "best": figures.best_recovered_tiles(source),
        **({"curves": curves} if curves is not None else {}),
    }


def _render_page(sources: Sequence[Source], shared: Pngs, by_source: Sequence[Pngs]) -> str:
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("raypp.evaluation.report", "."), autoescape=True)
    cards = [source.card for source in sources]
    labels = [card["label"] for card in cards]
    return environment.get_template("report.html.j2").render(
        version=raypp.__version__,
        date=datetime.now(UTC).date(),
        figures=_data_uris(shared),
        gallery_sizes=[f"{size:,}" for size in GALLERY_SIZES],
        matchers=MATCHERS,
        targets=[
            {
                "card": card,
                "target": short_name(card["target"]),
                "title": f"{label} ({short_name(card['target'])})" if labels.count(label) > 1 else label,
                "explanation": explain_results(card),
                "client": _explain_client(card),
                "rows": _rows(card),
                "figures": _data_uris(pngs),
                "convergence": _explain_convergence(card["attacks"]),
                "extra_scores": list(_extra_rows(card["attacks"])),
            }
            for card, label, pngs in zip(cards, labels, by_source, strict=True)
        ],
    )


def _explain_client(card: dict[str, Any]) -> str:
    if client := card.get("client"):
        return f"{describe_cost(client)} {describe_gain(client)}"
    note = card.get("client_note")
    return f"The client's cost was not measured: {note}." if note else ""


def _data_uris(pngs: Pngs) -> dict[str, str]:
    return {name: f"data:image/png;base64,{base64.b64encode(png).decode()}" for name, png in pngs.items()}


def explain_results(card: dict[str, Any]) -> str:
    """The results of a scorecard in a few sentences."""
    if card["strongest_attack"] is None:
        return "No attack has run."
    attack = card["attacks"][card["strongest_attack"]]
    num = sum(a["status"] == "done" for a in card["attacks"].values())
    not_converged = ", but some had not converged: stronger ones may do better" if card["lower_bound"] else ""
    conclusion = {
        "inconclusive": f"This says nothing about the protection: {card.get('verdict_reason', '')}.",
        "broken": "Do not rely on it to keep pictures private.",
        "weak": "It hides some pictures and loses others.",
        "holds": f"The protection held against these attacks{not_converged}.",
    }[card["verdict"]]
    reconstruction = ""
    if (name := card["strongest_reconstruction"]) not in (None, card["strongest_attack"]):
        rate, ssim = card["reidentification_rate_by_reconstruction"], card["attacks"][name]["scores"]["ssim"]["mean"]
        reconstruction = (
            f"The strongest reconstruction attack, {name}, re-identifies {rate:.1%}, with SSIM {ssim:.2f}. "
        )
    validity = "" if card["verdict"] == "inconclusive" else " The verdict holds for a gallery of this size."
    accuracy = f"The classifier's accuracy on protected images is {card['accuracy']:.1%}. " if card["accuracy"] else ""
    attacks = "one attack" if num == 1 else f"{num} attacks"
    return (
        f"{accuracy}The strongest of {attacks}, {card['strongest_attack']}, with {attack['threat_meaning']}, "
        f"re-identifies {card['reidentification_rate']:.1%} of {attack['num_queries']:,} originals among "
        f"{attack['num_gallery']:,} pictures; chance is {1 / attack['num_gallery']:.2%}. {reconstruction}{conclusion}"
        f"{validity}"
    )


def _explain_convergence(attacks: dict[str, dict[str, Any]]) -> str:
    sentences = [
        f"{name} still rises with more {' and more '.join(attack['rises_with'])}: its score is a lower bound."
        for name, attack in attacks.items()
        if attack.get("rises_with")
    ]
    unknown = [f"{name} ({' and '.join(a['unknown'])})" for name, a in attacks.items() if a.get("unknown")]
    if unknown:
        scores = "its score is a lower bound" if len(unknown) == 1 else "their scores are lower bounds"
        sentences.append(f"Convergence is not known for {', '.join(unknown)}: {scores}.")
    converged = [name for name, a in attacks.items() if a.get("curve") and not a.get("lower_bound")]
    if converged:
        sentences.append(
            f"Converged: {', '.join(converged)}. Twice the budget, or four times the images for trained attacks, gave "
            "less than 0.01 more."
        )
    return " ".join(sentences)


def _extra_rows(attacks: dict[str, dict[str, Any]]) -> Iterator[tuple[str, str, str]]:
    """Attack, score with its interval, and description of each extra score."""
    for name, attack in attacks.items():
        for key, description in attack.get("extra_scores", {}).items():
            if key in attack["scores"]:  # one image alone has no AUC
                yield name, format_extra_score(key, attack["scores"][key]), description


def _rows(card: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the page's table: attacks, then baselines."""
    rows = []
    for name, attack in card["attacks"].items():
        reasons = [f"still rises with more {option}" for option in attack.get("rises_with") or []]
        reasons += [f"not known whether more {option} help" for option in attack.get("unknown") or []]
        row = attack | {"name": name, "is_baseline": False, "why": "; ".join(reasons)}
        rows.append(row | _format_scores(attack.get("scores"), attack.get("num_queries"), attack.get("matcher")))
    for name, scores in card["baselines"].items():
        row = {"name": f"baseline: {name}", "is_baseline": True}
        rows.append(row | _format_scores(scores, card["num_queries"], BASELINE_MATCHER))
    return rows


def _format_scores(
    scores: dict[str, dict[str, float]] | None, num_queries: int | None, matcher: str | None
) -> dict[str, Any]:
    if scores is None:
        return {"scores": False}

    def mean(name: str, form: str = ".3f") -> str:
        return format(scores[name]["mean"], form) if name in scores else "-"

    rate = scores["reidentified"]
    return {
        "scores": True,
        "num": "" if num_queries is None else f"{num_queries:,}",
        "reidentification_rate": mean("reidentified", ".1%"),
        "interval": f"{rate['low']:.1%} to {rate['high']:.1%}",
        "matcher": matcher,
        "bits": mean("bits_identified", ".1f"),
        "sizes": [mean(f"reidentified_of_{size}", ".1%") for size in GALLERY_SIZES],
        "matchers": [mean(f"reidentified_{name}", ".1%") for name in MATCHERS],
        "top5": mean("reidentified_top5", ".1%"),
        "same_class": mean("reidentified_same_class", ".1%"),
        "unseen": mean("reidentified_unseen", ".1%"),
        "ssim": mean("ssim"),
        "invariant": mean("ssim_invariant"),
        "lab": mean("ssim_lab"),
        "lpips": mean("lpips"),
        "top_1_percent": f"{_top_1_percent(scores['ssim']):.3f}",
        "psnr": mean("psnr", ".2f"),
        "edges": mean("edges"),
        "accuracy": mean("accuracy", ".1%"),
    }


def _top_1_percent(numbers: dict[str, float]) -> float:
    """The 99th percentile of a metric; scorecards of earlier versions name it otherwise."""
    return numbers["top_1_percent" if "top_1_percent" in numbers else "worst_1_percent"]


def _csv_rows(card: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One row for each metric of each attack and baseline."""
    baselines = {
        f"baseline: {name}": {"num_queries": card["num_queries"], "scores": scores}
        for name, scores in card["baselines"].items()
    }
    for name, attack in (card["attacks"] | baselines).items():
        for metric, numbers in attack.get("scores", {}).items():
            row = attack | {"target": card["target"], "attack": name, "metric": metric} | numbers
            yield row | ({"top_1_percent": _top_1_percent(numbers)} if "max" in numbers else {})
