"""Pictures of the report: plots of scores, and contact sheets of originals, protected images and reconstructions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from raypp.evaluation.output import as_png, new_figure
from raypp.evaluation.report.source import Source
from raypp.utils.images import Pixels, encode_png

COLORS = {"holds": "#1f8a4c", "weak": "#b8860b", "broken": "#c0392b", "inconclusive": "#66707c"}
LABEL_SPACING = (18, 40)  # points: minimum horizontal distance of labels whose vertical distance is smaller
MIN_TILE_WIDTH = 64  # pixels; smaller images are magnified
GAP, CAPTION_HEIGHT = 5, 15  # pixels

Curves = dict[str, list[tuple[float, float]]]
"""Points (x, SSIM) by attack."""
Row = tuple[str, np.ndarray, Sequence[str] | None]
"""Title, images (N, C, H, W), and a caption for each image."""


def score_boxes(source: Source) -> bytes:
    """Fig. 5: PSNR and SSIM of every image under every attack, with outliers; baselines below."""
    attacks = source.finished_attacks
    names = [*attacks, *(f"baseline: {name}" for name in source.card["baselines"])]
    figure, panels = new_figure(11, 1.2 + 0.34 * len(names), 2, share_y=True)
    for panel, metric, title in zip(panels, ("psnr", "ssim"), ("PSNR, dB (60 is exact)", "SSIM"), strict=True):
        plot = panel.boxplot(
            [source.scores[name][metric] for name in names],
            orientation="horizontal",
            patch_artist=True,
            flierprops={"marker": ".", "markersize": 3, "alpha": 0.35},
            medianprops={"color": "#1d2530"},
        )
        for name, box in zip(names, plot["boxes"], strict=True):
            box.set(facecolor=COLORS[attacks[name]["verdict"]] if name in attacks else "#c9d0d8", alpha=0.75)
        panel.set_yticks(range(1, len(names) + 1), names)
        panel.set_xlabel(title)
        panel.grid(axis="x", alpha=0.3)
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
    plots = (
        (history, {"title": "within one training", "xlabel": "epoch of the training", "ylabel": own}),
        (images, {"title": "with fewer pairs", "xlabel": "images that the attacker has", "ylabel": queries}),
        (epochs, {"title": "with half the epochs", "xlabel": "epochs of the training", "ylabel": queries}),
    )
    plots_with_data = [(curves, axes) for curves, axes in plots if any(curves.values())]
    if not plots_with_data:
        return None
    figure, panels = new_figure(4.4 * len(plots_with_data), 3.6, len(plots_with_data))
    for panel, (curves, axes) in zip(panels, plots_with_data, strict=True):
        for name, points in curves.items():
            if points:
                panel.plot(*zip(*points, strict=True), marker="o", ms=4, label=name)
        panel.set(ylim=(0, 1), **axes)
        if curves is images:
            panel.set_xscale("log")
        else:
            panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(alpha=0.3)
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
    figure, (panel,) = new_figure(8, 5.4)
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


def protected_tiles(sources: Sequence[Source]) -> bytes:
    """Fig. 3: plain images above their protected versions."""
    rows: list[Row] = []
    plain: bytes | None = None
    for source in sources:
        if source.pictures["plain"].tobytes() != plain:
            rows.append(("plain", source.pictures["plain"], None))
            plain = source.pictures["plain"].tobytes()
        rows.append((source.card["label"], source.pictures["protected"], None))
    return _contact_sheet(rows)


def estimate_tiles(source: Source) -> bytes:
    """Fig. 4: plain images, protected images and each attack's reconstructions with their PSNR."""
    pictures = source.pictures
    rows: list[Row] = [("plain", pictures["plain"], None), ("protected", pictures["protected"], None)]
    for name in source.finished_attacks:
        plain = pictures[f"{name}/first/plain"]
        if not np.array_equal(plain, pictures["plain"]):  # results of an earlier run
            rows.append((f"plain of {name}", plain, None))
        captions = [f"{psnr:.1f} dB" for psnr in pictures[f"{name}/first/psnr"]]
        rows.append((name, pictures[f"{name}/first/estimate"], captions))
    return _contact_sheet(rows)


def best_recovered_tiles(source: Source) -> bytes:
    """Images that the strongest reconstruction attack recovered best; a matching attack would show the originals."""
    card, pictures = source.card, source.pictures
    name = card["strongest_reconstruction"] or card["strongest_attack"] or next(iter(card["attacks"]))
    key = f"{name}/worst"
    if f"{key}/plain" not in pictures:
        return _contact_sheet([("plain", pictures["plain"], None)])
    rows: list[Row] = [(title, pictures[f"{key}/{title}"], None) for title in ("plain", "protected")]
    captions = [f"SSIM {ssim:.2f}" for ssim in pictures[f"{key}/ssim"]]
    return _contact_sheet([*rows, (name, pictures[f"{key}/estimate"], captions)])


def _contact_sheet(rows: Sequence[Row]) -> bytes:
    """Draw rows of images, with the titles at the left and captions under the images."""
    font, small_font = ImageFont.load_default(size=15), ImageFont.load_default(size=11)
    tile_rows = [(title, _tiles(images), captions) for title, images, captions in rows]
    left = int(max(font.getlength(title) for title, _, _ in tile_rows)) + 2 * GAP
    width = left + max(sum(tile.shape[1] + GAP for tile in tiles) for _, tiles, _ in tile_rows)
    heights = [tiles.shape[1] + GAP + (CAPTION_HEIGHT if captions else 0) for _, tiles, captions in tile_rows]
    canvas = Image.new("RGB", (width, sum(heights) + GAP), "white")
    draw = ImageDraw.Draw(canvas)
    top = GAP
    for (title, tiles, captions), height in zip(tile_rows, heights, strict=True):
        draw.text((left - GAP, top + tiles.shape[1] // 2), title, fill="#1d2530", font=font, anchor="rm")
        for i, tile in enumerate(tiles):
            x = left + i * (tile.shape[1] + GAP)
            canvas.paste(Image.fromarray(tile), (x, top))
            if captions:
                position = (x + tile.shape[1] // 2, top + tile.shape[0] + 1)
                draw.text(position, captions[i], fill="#66707c", font=small_font, anchor="mt")
        top += height
    return encode_png(np.array(canvas))


def _tiles(images: np.ndarray) -> Pixels:
    """Convert (N, C, H, W) to RGB (N, H, W, 3) and magnify small images."""
    pixels = np.repeat(images, 3, axis=1) if images.shape[1] == 1 else images
    factor = max(1, -(-MIN_TILE_WIDTH // pixels.shape[3]))
    return pixels.transpose(0, 2, 3, 1).repeat(factor, axis=1).repeat(factor, axis=2)
