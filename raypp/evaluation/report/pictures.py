"""Contact sheets of the report: originals, protected images and reconstructions."""

from __future__ import annotations

import base64
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from raypp.evaluation.report.source import Source
from raypp.utils.images import Pixels, encode_png

MIN_TILE_WIDTH = 64  # pixels; smaller images are magnified
GAP, CAPTION_HEIGHT = 5, 15  # pixels

Row = tuple[str, np.ndarray, Sequence[str] | None]
"""Title, images (N, C, H, W), and a caption for each image."""


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
    rows: list[Row] = [("plain", source.pictures["plain"], None), ("protected", source.pictures["protected"], None)]
    for name in source.finished_attacks:
        key = f"{name}/first"
        if not np.array_equal(source.pictures[f"{key}/plain"], rows[0][1]):  # results of an earlier run
            rows.append((f"plain of {name}", source.pictures[f"{key}/plain"], None))
        captions = [f"{psnr:.1f} dB" for psnr in source.pictures[f"{key}/psnr"]]
        rows.append((name, source.pictures[f"{key}/estimate"], captions))
    return _contact_sheet(rows)


def best_recovered_tiles(source: Source) -> bytes:
    """Images that the strongest reconstruction attack recovered best; a matching attack would show the originals."""
    card = source.card
    name = card["strongest_reconstruction"] or card["strongest_attack"] or next(iter(card["attacks"]))
    key = f"{name}/worst"
    if f"{key}/plain" not in source.pictures:
        return _contact_sheet([("plain", source.pictures["plain"], None)])
    captions = [f"SSIM {ssim:.2f}" for ssim in source.pictures[f"{key}/ssim"]]
    return _contact_sheet(
        [
            ("plain", source.pictures[f"{key}/plain"], None),
            ("protected", source.pictures[f"{key}/protected"], None),
            (name, source.pictures[f"{key}/estimate"], captions),
        ]
    )


def data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


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
    pixels = pixels.transpose(0, 2, 3, 1)
    factor = max(1, -(-MIN_TILE_WIDTH // pixels.shape[2]))
    return pixels.repeat(factor, axis=1).repeat(factor, axis=2)
