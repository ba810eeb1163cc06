"""Figures of the report: scores by attack, convergence, and the front of accuracy and leakage."""

from __future__ import annotations

from collections.abc import Sequence

from raypp.evaluation.plotting import as_png, new_figure
from raypp.evaluation.report.pictures import finished_attacks
from raypp.evaluation.report.source import Source

COLOURS = {"holds": "#1f8a4c", "weak": "#b8860b", "broken": "#c0392b", "inconclusive": "#66707c"}


def score_boxes(source: Source) -> bytes:
    """Fig. 5: PSNR and SSIM of every image under every attack, with outliers; baselines below."""
    names = [*finished_attacks(source), *(f"baseline: {name}" for name in source.card["baselines"])]
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


def convergence_figure(source: Source) -> bytes | None:
    """Leakage against epochs within a training, and against effort from one training to the next; None without any."""
    epochs: dict[str, list[tuple[float, float]]] = {}
    effort: dict[str, list[tuple[float, float]]] = {}
    longer: dict[str, list[tuple[float, float]]] = {}
    for name in finished_attacks(source):
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


def accuracy_leakage_front(found: Sequence[Source]) -> bytes:
    """Share found by the worst attack (filled), and by the worst of those that draw (open), against accuracy."""
    figure = new_figure(8, 5.4)
    panel = figure.subplots()
    labels: list[tuple[float, float, str]] = []
    for s in found:
        if s.card["accuracy"] is None or s.card["reidentification_rate"] is None:
            continue
        x = 100 * s.card["accuracy"]
        worst, drawing = s.card["strongest_attack"], s.card["strongest_reconstruction"]
        if drawing not in (None, worst):
            attack = s.card["attacks"][drawing]
            y, low = 100 * s.card["attacks"][worst]["reidentification_rate"], 100 * attack["reidentification_rate"]
            panel.plot((x, x), (y, low), color="0.7", lw=1, zorder=1)
            panel.plot(x, low, "o", ms=9, color=COLOURS[attack["verdict"]], mfc="white")
            if y - low > 10:
                panel.annotate(drawing, (x, low), (8, -4), textcoords="offset points", fontsize=8)
        attack = s.card["attacks"][worst]
        y, colour = 100 * attack["reidentification_rate"], COLOURS[attack["verdict"]]
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
