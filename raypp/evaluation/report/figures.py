"""Pictures of the report: plots of scores, and contact sheets of originals, protected images and reconstructions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from raypp.evaluation.output import as_png, new_figure, styled
from raypp.evaluation.report.source import Source, distinct_labels
from raypp.utils.images import Pixels, encode_png

COLORS = {"holds": "#1f8a4c", "weak": "#b8860b", "broken": "#c0392b", "inconclusive": "#66707c"}
MIN_TILE_WIDTH = 64  # pixels; smaller images are magnified
GAP, CAPTION_HEIGHT = 5, 20  # pixels

Curves = dict[str, list[tuple[float, float]]]
"""Points (x, SSIM) by attack."""
Row = tuple[str, np.ndarray, Sequence[str] | None]
"""Title, images (N, C, H, W), and a caption for each image."""


@styled
def score_boxes(source: Source) -> bytes:
    """Fig. 5: PSNR and SSIM of every image under every attack, with outliers; baselines below."""
    attacks = source.finished_attacks
    names = [*attacks, *(f"baseline: {name}" for name in source.card["baselines"])]
    figure, panels = new_figure(11, 1.2 + 0.34 * len(names), 2, share_y=True)
    for panel, metric, title in zip(
        panels, ("psnr", "ssim"), ("PSNR, dB (60: equal to the original)", "SSIM"), strict=True
    ):
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
        panel.grid(visible=False, axis="y")
    panels[0].invert_yaxis()
    return as_png(figure, dpi=120)


@styled
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
        panel.legend()
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


def protected_tiles(sources: Sequence[Source]) -> bytes:
    """Fig. 3: plain images above their protected versions."""
    rows: list[Row] = []
    plain: bytes | None = None
    for source, label in zip(sources, distinct_labels(sources), strict=True):
        if source.pictures["plain"].tobytes() != plain:
            rows.append(("plain", source.pictures["plain"], None))
            plain = source.pictures["plain"].tobytes()
        rows.append((label, source.pictures["protected"], None))
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
    key = f"{name}/best"
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
                position = (x + tile.shape[1] // 2, top + tile.shape[0] + 3)
                draw.text(position, captions[i], fill="#66707c", font=small_font, anchor="mt")
        top += height
    return encode_png(np.array(canvas))


def _tiles(images: np.ndarray) -> Pixels:
    """Convert (N, C, H, W) to RGB (N, H, W, 3) and magnify small images."""
    pixels = np.repeat(images, 3, axis=1) if images.shape[1] == 1 else images
    factor = max(1, -(-MIN_TILE_WIDTH // pixels.shape[3]))
    return pixels.transpose(0, 2, 3, 1).repeat(factor, axis=1).repeat(factor, axis=2)
