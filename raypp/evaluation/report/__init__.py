"""What attacks recovered, as one HTML page that needs no network, with its figures as PNG and its numbers as CSV and
JSON beside it."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import raypp
from raypp.evaluation.plotting import as_png, new_figure
from raypp.utils import images as image_files
from raypp.utils.errors import BundleError, ConfigError, StorageError
from raypp.utils.images import Pixels
from raypp.utils.storage import Storage

COLOURS = {"holds": "#1f8a4c", "weak": "#b8860b", "broken": "#c0392b", "inconclusive": "#66707c"}
SCALE = 2  # each pixel of a small image becomes a square of this side
TILE = 64  # that an image is at least wide


@dataclass
class Source:
    """One scorecard with its pictures and scores."""

    card: dict[str, Any]
    scores: dict[str, dict[str, np.ndarray]]
    """Values of each metric, one per image, by attack (nulls are named ``null: ...``)."""
    pictures: dict[str, np.ndarray]
    figures: dict[str, str] = field(default_factory=dict)
    title: str = ""


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
    pngs: dict[str, bytes] = {"protected": _protected(found)}
    if any(s.card["accuracy"] is not None for s in found):
        pngs["front"] = _front(found)
    for i, source in enumerate(found, 1):
        made = {"estimates": _estimates(source), "boxes": _boxes(source), "worst": _worst(source)}
        if (curves := _curves(source)) is not None:
            made["curves"] = curves
        for name, png in made.items():
            pngs[f"{name}_{i}"] = png
            source.figures[name] = _embedded(png)
    page = Environment(loader=PackageLoader("raypp.evaluation.report", "."), autoescape=True).get_template(
        "report.html.j2"
    )
    html = page.render(
        version=raypp.__version__,
        date=datetime.now(UTC).date(),
        figures={name: _embedded(pngs[name]) for name in ("protected", "front") if name in pngs},
        victims=[
            {
                "card": s.card, "title": s.title, "words": words(s.card), "rows": _rows(s.card),
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


def read_source(location: str) -> Source:
    """Read a scorecard and what belongs to it; raises ConfigError where there is none."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    storage = Storage(location)
    for folder in ("", "private", "bundle/private"):
        at = storage.folder(folder) if folder else storage
        if at.exists("scorecard.json"):
            try:
                card = json.loads(at.read("scorecard.json"))
                pictures = dict(load(at.read("examples.safetensors")))
                scores = _read_scores(at.read("scores.csv").decode())
                if lacking := {"attacks", "nulls", "worst_attack", "worst_drawing", "label"} - set(card):
                    raise ValueError(f"scorecard.json lacks {', '.join(sorted(lacking))}")
            except (ValueError, KeyError, TypeError, SafetensorError) as error:
                raise BundleError(f"the scorecard in {at.uri} cannot be read: {error}") from error
            return Source(card, scores, pictures)
    raise ConfigError(f"{location!r} holds no scorecard; `raypp attack` makes one")


def words(card: dict[str, Any]) -> str:
    """The summary for people who did not run it."""
    if card["worst_attack"] is None:
        return "No attack has run."
    attack = card["attacks"][card["worst_attack"]]
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
    if card["worst_drawing"] not in (None, card["worst_attack"]):
        drawn = card["attacks"][card["worst_drawing"]]
        drawing = (
            f"Of those that draw a picture without having it among candidates, {card['worst_drawing']} did best: "
            f"{card['found_by_drawing']:.1%} found, SSIM {drawn['scores']['ssim']['mean']:.2f}. "
        )
    accuracy = f"The cloud reads {card['accuracy']:.1%} of protected images correctly. " if card["accuracy"] else ""
    return (
        f"{accuracy}We tried {ways} to get the originals back. The best, {card['worst_attack']}, with "
        f"{attack['threat_meaning']}, found {card['found']:.1%} of {attack['num_queries']:,} originals among "
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
    for name, scores in card["nulls"].items():
        row = {"name": f"null: {name}", "threat": "", "meaning": "", "note": "", "null": True, "verdict": None}
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
        "found": share(best),
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
    writer.writerow(["victim", "attack", "threat", "status", "num_queries", "found", "verdict",
                     "verdict_reason", "lower_bound", "metric",
                     "mean", "low", "high", "median", "worst_1_percent", "max"])  # fmt: skip
    for s in found:
        for name, a in s.card["attacks"].items():
            head = [s.card["victim"], name, a["threat"], a["status"], a.get("num_queries", ""), a.get("found", ""),
                    a.get("verdict", ""), a.get("verdict_reason", ""), a.get("lower_bound", "")]  # fmt: skip
            keys = ("mean", "low", "high", "median", "worst_1_percent", "max")
            for metric, numbers in a.get("scores", {}).items():
                writer.writerow([*head, metric, *(numbers.get(key, "") for key in keys)])
        for name, scores in s.card["nulls"].items():
            for metric, numbers in scores.items():
                head = [s.card["victim"], f"null: {name}", "", "", s.card["num_queries"], "", "", ""]
                writer.writerow([*head, metric, *(numbers.get(key, "") for key in keys)])
    return text.getvalue().encode()


def _read_scores(text: str) -> dict[str, dict[str, np.ndarray]]:
    rows = list(csv.DictReader(io.StringIO(text)))
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        of = found.setdefault(row["attack"], {})
        for name, value in row.items():
            if name not in {"attack", "image", "label"} and value:
                of.setdefault(name, []).append(float(value))
    return {name: {key: np.array(values) for key, values in of.items()} for name, of in found.items()}


# Pictures


def _tiles(images: np.ndarray) -> Pixels:
    """(N, C, H, W) as RGB (N, H, W, 3), small ones enlarged."""
    pixels = np.repeat(images, 3, axis=1) if images.shape[1] == 1 else images
    pixels = pixels.transpose(0, 2, 3, 1)
    times = max(1, -(-TILE // pixels.shape[2]))
    return pixels.repeat(times, axis=1).repeat(times, axis=2)


def _sheet(rows: Sequence[tuple[str, np.ndarray, Sequence[str] | None]]) -> bytes:
    """Rows of images, each with its name at the left and, where there is one, a caption under each image."""
    gap, line = 5, 15
    font, small = ImageFont.load_default(size=15), ImageFont.load_default(size=11)
    made = [(name, _tiles(images), captions) for name, images, captions in rows]
    left = int(max(font.getlength(name) for name, _, _ in made)) + 2 * gap
    width = left + max(sum(t.shape[1] + gap for t in tiles) for _, tiles, _ in made)
    height = sum(tiles.shape[1] + gap + (line if captions else 0) for _, tiles, captions in made) + gap
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    top = gap
    for name, tiles, captions in made:
        draw.text((left - gap, top + tiles.shape[1] // 2), name, fill="#1d2530", font=font, anchor="rm")
        for i, tile in enumerate(tiles):
            x = left + i * (tile.shape[1] + gap)
            canvas.paste(Image.fromarray(tile), (x, top))
            if captions:
                middle = (x + tile.shape[1] // 2, top + tile.shape[0] + 1)
                draw.text(middle, captions[i], fill="#66707c", font=small, anchor="mt")
        top += tiles.shape[1] + gap + (line if captions else 0)
    return image_files.encode_png(np.array(canvas))


def _protected(found: Sequence[Source]) -> bytes:
    """Fig. 3: plain images over what each protection makes of them."""
    rows: list[tuple[str, np.ndarray, Sequence[str] | None]] = []
    shown: bytes | None = None
    for s in found:
        if s.pictures["plain"].tobytes() != shown:
            rows.append(("plain", s.pictures["plain"], None))
            shown = s.pictures["plain"].tobytes()
        rows.append((s.card["label"], s.pictures["protected"], None))
    return _sheet(rows)


def _done(source: Source) -> list[str]:
    return [name for name, a in source.card["attacks"].items() if a["status"] == "done"]


def _captions(source: Source, key: str) -> list[str]:
    return [f"{psnr:.1f} dB" for psnr in source.pictures[f"{key}/psnr"]]


def _estimates(source: Source) -> bytes:
    """Fig. 4: plain, protected and what each attack makes of it, PSNR under each."""
    rows: list[tuple[str, np.ndarray, Sequence[str] | None]] = [
        ("plain", source.pictures["plain"], None),
        ("protected", source.pictures["protected"], None),
    ]
    for name in _done(source):
        key = f"{name}/first"
        if not np.array_equal(source.pictures[f"{key}/plain"], rows[0][1]):  # kept of a run on other images
            rows.append((f"plain of {name}", source.pictures[f"{key}/plain"], None))
        rows.append((name, source.pictures[f"{key}/estimate"], _captions(source, key)))
    return _sheet(rows)


def _worst(source: Source) -> bytes:
    """What the worst of the attacks that draw recovered best; one that picks from candidates shows the originals."""
    name = source.card["worst_drawing"] or source.card["worst_attack"] or next(iter(source.card["attacks"]))
    key = f"{name}/worst"
    if f"{key}/plain" not in source.pictures:
        return _sheet([("plain", source.pictures["plain"], None)])
    captions = [f"SSIM {s:.2f}" for s in source.pictures[f"{key}/ssim"]]
    return _sheet(
        [
            ("plain", source.pictures[f"{key}/plain"], None),
            ("protected", source.pictures[f"{key}/protected"], None),
            (name, source.pictures[f"{key}/estimate"], captions),
        ]
    )


def _boxes(source: Source) -> bytes:
    """Fig. 5: PSNR and SSIM of every image under every attack, with outliers; nulls below."""
    names = [*_done(source), *(f"null: {name}" for name in source.card["nulls"])]
    figure = new_figure(11, 1.2 + 0.34 * len(names))
    panels = figure.subplots(1, 2, sharey=True)
    for panel, metric, title in zip(panels, ("psnr", "ssim"), ("PSNR, dB (60 is exact)", "SSIM"), strict=True):
        drawn = panel.boxplot(
            [source.scores[name][metric] for name in names],
            orientation="horizontal",
            patch_artist=True,
            flierprops={"marker": ".", "markersize": 3, "alpha": 0.35},
            medianprops={"color": "#1d2530"},
        )
        for name, box in zip(names, drawn["boxes"], strict=True):
            attack = source.card["attacks"].get(name)
            box.set_facecolor(COLOURS[attack["verdict"]] if attack else "#c9d0d8")
            box.set_alpha(0.75)
        panel.set_yticks(range(1, len(names) + 1), names)
        panel.set_xlabel(title)
        panel.grid(axis="x", alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    return as_png(figure, dpi=120)


def _curves(source: Source) -> bytes | None:
    """Leakage against epochs within a training, and against effort from one training to the next; None without any."""
    epochs: dict[str, list[tuple[float, float]]] = {}
    effort: dict[str, list[tuple[float, float]]] = {}
    longer: dict[str, list[tuple[float, float]]] = {}
    for name in _done(source):
        attack = source.card["attacks"][name]
        epochs[name] = [(row["epoch"], row["val_ssim"]) for row in attack["history"] if "val_ssim" in row]
        points = {point["what"]: point for point in attack["curve"]}
        for lines, key, wanted in (
            (effort, "num_images", ("a sixteenth of the images", "a quarter of the images", "everything")),
            (longer, "epochs", ("half the epochs", "everything")),
        ):
            found = [points[what] for what in wanted if what in points and key in points[what]]
            if len(found) > 1:
                lines[name] = [(p[key], p["ssim_invariant"]) for p in found]
    own, queries = "SSIM on the attacker's own images", "SSIM on the queries"
    drawn = [
        (lines, axes)
        for lines, axes in (
            (epochs, {"title": "within one training", "xlabel": "epoch of the training", "ylabel": own}),
            (effort, {"title": "with fewer pairs", "xlabel": "images that the attacker has", "ylabel": queries}),
            (longer, {"title": "with half the epochs", "xlabel": "epochs of the training", "ylabel": queries}),
        )
        if any(lines.values())
    ]
    if not drawn:
        return None
    figure = new_figure(4.4 * len(drawn), 3.6)
    for panel, (lines, axes) in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn, strict=True):
        for name, line in lines.items():
            if line:
                panel.plot(*zip(*line, strict=True), marker="o", ms=4, label=name)
        panel.set(ylim=(0, 1), **axes)
        if lines is effort:
            panel.set_xscale("log")
        else:
            panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, fontsize=8)
    return as_png(figure, dpi=120)


def _front(found: Sequence[Source]) -> bytes:
    """Share found by the worst attack (filled), and by the worst of those that draw (open), against accuracy."""
    figure = new_figure(8, 5.4)
    panel = figure.subplots()
    labels: list[tuple[float, float, str]] = []
    for s in found:
        if s.card["accuracy"] is None or s.card["found"] is None:
            continue
        x = 100 * s.card["accuracy"]
        worst, drawing = s.card["worst_attack"], s.card["worst_drawing"]
        if drawing not in (None, worst):
            attack = s.card["attacks"][drawing]
            y, low = 100 * s.card["attacks"][worst]["found"], 100 * attack["found"]
            panel.plot((x, x), (y, low), color="0.7", lw=1, zorder=1)
            panel.plot(x, low, "o", ms=9, color=COLOURS[attack["verdict"]], mfc="white")
            if y - low > 10:
                panel.annotate(drawing, (x, low), (8, -4), textcoords="offset points", fontsize=8)
        attack = s.card["attacks"][worst]
        y, colour = 100 * attack["found"], COLOURS[attack["verdict"]]
        panel.plot(x, y, "o", ms=9, color=colour)
        labels.append((x, y, f"{s.card['label']}: {worst}"))
    panel.axhspan(0, 5, color=COLOURS["holds"], alpha=0.08)
    panel.axhspan(5, 20, color=COLOURS["weak"], alpha=0.08)
    panel.axhspan(20, 104, color=COLOURS["broken"], alpha=0.05)
    panel.set(
        ylim=(0, 145),
        yticks=range(0, 101, 20),
        xlabel="test accuracy on protected images, %",
        ylabel="originals found by the worst attack, %",
    )
    panel.margins(x=0.2)
    panel.spines[["top", "right"]].set_visible(False)
    # Aslant: many sources lie side by side on one height, all broken or none. Where they are close, labels move on.
    points = 72 / figure.dpi
    taken: list[tuple[float, float]] = []
    for x, y, text in sorted(labels):
        at, height = panel.transData.transform((x, y)) * points
        start = max([at + 4, *(before + 18 for before, other in taken if abs(other - height) < 40)])
        taken.append((start, height))
        panel.annotate(
            text, (x, y), (start - at, 12), textcoords="offset points", fontsize=8, rotation=35,
            rotation_mode="anchor", arrowprops={"arrowstyle": "-", "color": "0.6", "lw": 0.5, "shrinkA": 0},
        )  # fmt: skip
    return as_png(figure, dpi=120)


def _embedded(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
