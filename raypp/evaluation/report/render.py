"""What attacks recovered, as one HTML page that needs no network, with its figures as PNG and its numbers as CSV and
JSON beside it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import raypp
from raypp.evaluation.report.figures import accuracy_leakage_front, convergence_figure, score_boxes
from raypp.evaluation.report.pictures import best_recovered_tiles, data_uri, estimate_tiles, protected_tiles
from raypp.evaluation.report.source import Source, read_source
from raypp.utils.errors import ConfigError, StorageError
from raypp.utils.storage import Storage


def write_report(sources: Sequence[str], target: Storage) -> dict[str, Any]:
    """Write ``report.html``, ``report.json``, ``report.csv`` and the figures; returns what ``report.json`` holds.

    Args:
        sources: attack runs, or bundles (also runs with one) that were attacked; paths or URIs.

    Raises:
        ConfigError: no source is given, or one of them holds no scorecard.
        StorageError: the target cannot be written.
    """
    from jinja2 import Environment, PackageLoader

    if not sources:
        raise ConfigError("no source is given; name attack runs, or bundles that were attacked")
    found = [read_source(source) for source in sources]
    if not target.exists("report.json") and not target.exists("scorecard.json") and target.names():
        raise StorageError(f"{target.uri} holds other files; give a new or empty folder, or one of an earlier report")
    titles = [s.card["label"] for s in found]
    for source in found:
        twice = titles.count(source.card["label"]) > 1
        source.title = f"{source.card['label']} ({source.card['victim']})" if twice else source.card["label"]
    pngs: dict[str, bytes] = {"protected": protected_tiles(found)}
    if any(s.card["accuracy"] is not None for s in found):
        pngs["front"] = accuracy_leakage_front(found)
    for i, source in enumerate(found, 1):
        made = {
            "estimates": estimate_tiles(source),
            "boxes": score_boxes(source),
            "worst": best_recovered_tiles(source),
        }
        if (curves := convergence_figure(source)) is not None:
            made["curves"] = curves
        for name, png in made.items():
            pngs[f"{name}_{i}"] = png
            source.figures[name] = data_uri(png)
    page = Environment(loader=PackageLoader("raypp.evaluation.report", "."), autoescape=True).get_template(
        "report.html.j2"
    )
    html = page.render(
        version=raypp.__version__,
        date=datetime.now(UTC).date(),
        figures={name: data_uri(pngs[name]) for name in ("protected", "front") if name in pngs},
        victims=[
            {
                "card": s.card, "title": s.title, "words": explain_results(s.card), "rows": _rows(s.card),
                "figures": s.figures, "effort": _effort(s.card),
            }
            for s in found
        ],
    )  # fmt: skip
    for name, png in pngs.items():
        target.write(f"figures/{name}.png", png)
    summary = {"victims": [s.card for s in found]}
    target.write("report.csv", _csv(found))
    target.write("report.json", (json.dumps(summary, indent=1) + "\n").encode())
    target.write("report.html", html.encode())
    return summary


def explain_results(card: dict[str, Any]) -> str:
    """The summary for people who did not run it."""
    if card["strongest_attack"] is None:
        return "No attack has run."
    attack = card["attacks"][card["strongest_attack"]]
    num = sum(a["status"] == "done" for a in card["attacks"].values())
    ways = "one way" if num == 1 else f"{num} ways"
    says = {
        "inconclusive": f"This says nothing about the protection: {card.get('verdict_reason', '')}.",
        "broken": "Do not rely on it to keep pictures private.",
        "weak": "It hides some pictures and loses others.",
        "holds": "Against these attacks it held"
        + (
            ", but some of them were still getting better: stronger ones may do better." if card["lower_bound"] else "."
        ),
    }[card["verdict"]]
    drawing = ""
    if card["strongest_reconstruction"] not in (None, card["strongest_attack"]):
        drawn = card["attacks"][card["strongest_reconstruction"]]
        drawing = (
            f"Of those that draw a picture without having it among candidates, {card['strongest_reconstruction']} did best: "
            f"{card['reidentification_rate_by_reconstruction']:.1%} found, SSIM {drawn['scores']['ssim']['mean']:.2f}. "
        )
    accuracy = f"The cloud reads {card['accuracy']:.1%} of protected images correctly. " if card["accuracy"] else ""
    return (
        f"{accuracy}We tried {ways} to get the originals back. The best, {card['strongest_attack']}, with "
        f"{attack['threat_meaning']}, found {card['reidentification_rate']:.1%} of {attack['num_queries']:,} originals among "
        f"{card['num_gallery']:,} pictures; blind guessing finds {card['chance']:.2%}. {drawing}{says}"
    )


def _effort(card: dict[str, Any]) -> str:
    rising = {n: a["rises_with"] for n, a in card["attacks"].items() if a.get("rises_with")}
    unknown = {n: a["unknown"] for n, a in card["attacks"].items() if a.get("unknown")}
    said = [f"{name} still rises with more {' and more '.join(what)}: a lower bound." for name, what in rising.items()]
    if unknown:
        parts = ", ".join(f"{name} ({' and '.join(what)})" for name, what in unknown.items())
        said.append(f"Whether more would find more is not known for {parts}: their scores are lower bounds.")
    flat = [n for n, a in card["attacks"].items() if a.get("curve") and not a.get("lower_bound")]
    if flat:
        said.append(
            f"Flat for {', '.join(flat)}: twice the effort, and of what learns from images four times as many, gave "
            "less than 0.01 more."
        )
    return " ".join(said)


def _rows(card: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for name, a in card["attacks"].items():
        row = {"name": name, "threat": a["threat"], "meaning": a["threat_meaning"], "note": a.get("note", ""),
               "status": a["status"], "null": False, "verdict": a.get("verdict"),
               "verdict_reason": a.get("verdict_reason", ""), "lower_bound": a.get("lower_bound"),
               "num": f"{a['num_queries']:,}" if "num_queries" in a else ""}  # fmt: skip
        rising, unknown = a.get("rises_with") or [], a.get("unknown") or []
        row["why"] = "; ".join(
            [f"still rises with more {what}" for what in rising] + [f"not known whether more {w} help" for w in unknown]
        )
        rows.append(row | _numbers(a.get("scores")))
    for name, scores in card["baselines"].items():
        row = {"name": f"baseline: {name}", "threat": "", "meaning": "", "note": "", "null": True, "verdict": None}
        rows.append(row | {"num": f"{card['num_queries']:,}"} | _numbers(scores))
    return rows


def _numbers(scores: dict[str, dict[str, float]] | None) -> dict[str, Any]:
    if scores is None:
        return {"scores": False}
    best = max("reidentified", "reidentified_edges", key=lambda name: scores[name]["mean"])
    extra = {"lpips": f"{scores['lpips']['mean']:.3f}" if "lpips" in scores else "-"}

    def share(name: str) -> str:
        return f"{scores[name]['mean']:.1%}" if name in scores else "-"

    return {
        "scores": True,
        "reidentification_rate": share(best),
        "interval": f"{scores[best]['low']:.1%} to {scores[best]['high']:.1%}",
        "top5": share("reidentified_top5"),
        "same_class": share("reidentified_same_class"),
        "ssim": f"{scores['ssim']['mean']:.3f}",
        "invariant": f"{scores['ssim_invariant']['mean']:.3f}",
        "lab": f"{scores['ssim_lab']['mean']:.3f}",
        **extra,
        "worst": f"{scores['ssim']['worst_1_percent']:.3f}",
        "psnr": f"{scores['psnr']['mean']:.2f}",
        "edges": f"{scores['edges']['mean']:.3f}",
        "accuracy": share("accuracy"),
    }


def _csv(found: Sequence[Source]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["victim", "attack", "threat", "status", "num_queries", "reidentification_rate", "verdict",
                     "verdict_reason", "lower_bound", "metric",
                     "mean", "low", "high", "median", "worst_1_percent", "max"])  # fmt: skip
    for s in found:
        for name, a in s.card["attacks"].items():
            head = [
                s.card["victim"],
                name,
                a["threat"],
                a["status"],
                a.get("num_queries", ""),
                a.get("reidentification_rate", ""),
                a.get("verdict", ""),
                a.get("verdict_reason", ""),
                a.get("lower_bound", ""),
            ]
            keys = ("mean", "low", "high", "median", "worst_1_percent", "max")
            for metric, numbers in a.get("scores", {}).items():
                writer.writerow([*head, metric, *(numbers.get(key, "") for key in keys)])
        for name, scores in s.card["baselines"].items():
            for metric, numbers in scores.items():
                head = [s.card["victim"], f"baseline: {name}", "", "", s.card["num_queries"], "", "", ""]
                writer.writerow([*head, metric, *(numbers.get(key, "") for key in keys)])
    return text.getvalue().encode()
