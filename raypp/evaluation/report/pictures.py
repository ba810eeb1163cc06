"""Contact sheets of the report: originals, protected images and reconstructions."""

from __future__ import annotations

import base64
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from raypp.evaluation.report.source import Source
from raypp.utils import images as image_files
from raypp.utils.images import Pixels

SCALE = 2  # each pixel of a small image becomes a square of this side
TILE = 64  # that an image is at least wide


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


def protected_tiles(found: Sequence[Source]) -> bytes:
    """Fig. 3: plain images over what each protection makes of them."""
    rows: list[tuple[str, np.ndarray, Sequence[str] | None]] = []
    shown: bytes | None = None
    for s in found:
        if s.pictures["plain"].tobytes() != shown:
            rows.append(("plain", s.pictures["plain"], None))
            shown = s.pictures["plain"].tobytes()
        rows.append((s.card["label"], s.pictures["protected"], None))
    return _sheet(rows)


def finished_attacks(source: Source) -> list[str]:
    return [name for name, a in source.card["attacks"].items() if a["status"] == "done"]


def _captions(source: Source, key: str) -> list[str]:
    return [f"{psnr:.1f} dB" for psnr in source.pictures[f"{key}/psnr"]]


def estimate_tiles(source: Source) -> bytes:
    """Fig. 4: plain, protected and what each attack makes of it, PSNR under each."""
    rows: list[tuple[str, np.ndarray, Sequence[str] | None]] = [
        ("plain", source.pictures["plain"], None),
        ("protected", source.pictures["protected"], None),
    ]
    for name in finished_attacks(source):
        key = f"{name}/first"
        if not np.array_equal(source.pictures[f"{key}/plain"], rows[0][1]):  # kept of a run on other images
            rows.append((f"plain of {name}", source.pictures[f"{key}/plain"], None))
        rows.append((name, source.pictures[f"{key}/estimate"], _captions(source, key)))
    return _sheet(rows)


def best_recovered_tiles(source: Source) -> bytes:
    """What the worst of the attacks that draw recovered best; one that picks from candidates shows the originals."""
    name = (
        source.card["strongest_reconstruction"] or source.card["strongest_attack"] or next(iter(source.card["attacks"]))
    )
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


def data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
