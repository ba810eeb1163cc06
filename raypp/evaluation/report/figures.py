"""Figures of the report: scores by attack, convergence, and leakage against accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from raypp.evaluation.plotting import as_png, new_figure
from raypp.evaluation.report.source import Source

COLORS = {"holds": "#1f8a4c", "weak": "#b8860b", "broken": "#c0392b", "inconclusive": "#66707c"}
LABEL_SPACING = (18, 40)  # points: minimum horizontal distance of labels whose vertical distance is smaller

Curves = dict[str, list[tuple[float, float]]]
"""Points (x, SSIM) by attack."""


def score_boxes(source: Source) -> bytes:
    """Fig. 5: PSNR and SSIM of every image under every attack, with outliers; baselines below."""
    attacks = source.finished_attacks
    names = [*attacks, *(f"baseline: {name}" for name in source.card["baselines"])]
    figure = new_figure(11, 1.2 + 0.34 * len(names))
    panels = figure.subplots(1, 2, sharey=True)
    for panel, metric, title in zip(panels, ("psnr", "ssim"), ("PSNR, dB (60 is exact)", "SSIM"), strict=True):
        plot = panel.boxplot(
            [source.scores[name][metric] for name in names],
            orientation="horizontal",
            patch_artist=True,
            flierprops={"marker": ".", "markersize": 3, "alpha": 0.35},
            medianprops={"color": "#1d2530"},
        )
        for name, box in zip(names, plot["boxes"], strict=True):
            box.set_facecolor(COLORS[attacks[name]["verdict"]] if name in attacks else "#c9d0d8")
            box.set_alpha(0.75)
        panel.set_yticks(range(1, len(names) + 1), names)
        panel.set_xlabel(title)
        panel.grid(axis="x", alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    return as_png(figure, dpi=120)


def convergence_figure(source: Source) -> bytes | None:
    """Leakage against epochs within a training, number of images and number of epochs; None without any curve."""
    attacks = source.finished_attacks
    history = {
        name: [(row["epoch"], row["val_ssim"]) for row in attack["history"] if "val_ssim" in row]
        for name, attack in attacks.items()
    }
    sizes = ("a sixteenth of the images", "a quarter of the images", "everything")
    images = _budget_curves(attacks, "num_images", sizes)
    epochs = _budget_curves(attacks, "epochs", ("half the epochs", "everything"))
    own, queries = "SSIM on the attacker's own images", "SSIM on the queries"
    panels = (
        (history, {"title": "within one training", "xlabel": "epoch of the training", "ylabel": own}),
        (images, {"title": "with fewer pairs", "xlabel": "images that the attacker has", "ylabel": queries}),
        (epochs, {"title": "with half the epochs", "xlabel": "epochs of the training", "ylabel": queries}),
    )
    panels_with_data = [(curves, axes) for curves, axes in panels if any(curves.values())]
    if not panels_with_data:
        return None
    figure = new_figure(4.4 * len(panels_with_data), 3.6)
    subplots = figure.subplots(1, len(panels_with_data), squeeze=False)[0]
    for panel, (curves, axes) in zip(subplots, panels_with_data, strict=True):
        for name, points in curves.items():
            if points:
                panel.plot(*zip(*points, strict=True), marker="o", ms=4, label=name)
        panel.set(ylim=(0, 1), **axes)
        if curves is images:
            panel.set_xscale("log")
        else:
            panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, fontsize=8)
    return as_png(figure, dpi=120)


def _budget_curves(attacks: dict[str, dict[str, Any]], key: str, labels: tuple[str, ...]) -> Curves:
    """SSIM against the budget ``key`` at the labeled points, of attacks with two or more of them."""
    curves = {}
    for name, attack in attacks.items():
        points = {point["what"]: point for point in attack["curve"]}
        selected = [points[label] for label in labels if key in points.get(label, {})]
        if len(selected) > 1:
            curves[name] = [(point[key], point["ssim_invariant"]) for point in selected]
    return curves


def accuracy_leakage_front(sources: Sequence[Source]) -> bytes:
    """Re-identification rate against accuracy: the strongest attack (filled) and reconstruction attack (open)."""
    figure = new_figure(8, 5.4)
    panel = figure.subplots()
    labels: list[tuple[float, float, str]] = []
    for source in sources:
        if source.card["accuracy"] is not None and source.card["reidentification_rate"] is not None:
            labels.append(_plot_source(panel, source.card))
    for verdict, low, high, alpha in (("holds", 0, 5, 0.08), ("weak", 5, 20, 0.08), ("broken", 20, 104, 0.05)):
        panel.axhspan(low, high, color=COLORS[verdict], alpha=alpha)
    panel.set(
        ylim=(0, 145),
        yticks=range(0, 101, 20),
        xlabel="test accuracy on protected images, %",
        ylabel="re-identified by the strongest attack, %",
    )
    panel.margins(x=0.2)
    panel.spines[["top", "right"]].set_visible(False)
    _add_labels(panel, labels, 72 / figure.dpi)
    return as_png(figure, dpi=120)


def _plot_source(panel: Any, card: dict[str, Any]) -> tuple[float, float, str]:
    """Plot the points of one scorecard; returns position and text of its label."""
    x = 100 * card["accuracy"]
    name, reconstruction = card["strongest_attack"], card["strongest_reconstruction"]
    attack = card["attacks"][name]
    y = 100 * attack["reidentification_rate"]
    if reconstruction not in (None, name):
        other = card["attacks"][reconstruction]
        other_y = 100 * other["reidentification_rate"]
        panel.plot((x, x), (y, other_y), color="0.7", lw=1, zorder=1)
        panel.plot(x, other_y, "o", ms=9, color=COLORS[other["verdict"]], mfc="white")
        if y - other_y > 10:
            panel.annotate(reconstruction, (x, other_y), (8, -4), textcoords="offset points", fontsize=8)
    panel.plot(x, y, "o", ms=9, color=COLORS[attack["verdict"]])
    return x, y, f"{card['label']}: {name}"


def _add_labels(panel: Any, labels: list[tuple[float, float, str]], points_per_pixel: float) -> None:
    """Write slanted labels, shifted to the right where points lie close together."""
    spacing, min_height_difference = LABEL_SPACING
    placed: list[tuple[float, float]] = []
    for x, y, text in sorted(labels):
        position, height = panel.transData.transform((x, y)) * points_per_pixel
        neighbors = [left + spacing for left, other in placed if abs(other - height) < min_height_difference]
        left = max([position + 4, *neighbors])
        placed.append((left, height))
        panel.annotate(
            text, (x, y), (left - position, 12), textcoords="offset points", fontsize=8, rotation=35,
            rotation_mode="anchor", arrowprops={"arrowstyle": "-", "color": "0.6", "lw": 0.5, "shrinkA": 0},
        )  # fmt: skip
