"""Ten procedurally drawn shapes: built-in data for first steps, tests and offline machines."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from pydantic import Field

from raypp.data.base import DataSource, Example, Split
from raypp.utils import registry
from raypp.utils.errors import DataError
from raypp.utils.images import Pixels, to_grayscale

Plane: TypeAlias = npt.NDArray[np.float32]
"""float32 (N, H, W): one value per pixel."""
Vector: TypeAlias = npt.NDArray[np.float64]
"""float64 (N,): one value per image."""

# Images are drawn in chunks with separate random streams, so that image i does not depend on the number of images.
CHUNK = 100
MIN_SIDE = 16
NUM_PARAMETERS = 64
LUMA = (0.299, 0.587, 0.114)


class Shapes(DataSource):
    """Ten seeded, procedurally drawn shapes on random backgrounds; needs no files and no network.

    Image i of a split depends only on the seed, the split, i, and the image size. Its class is ``i % 10``.
    """

    class Options(registry.MethodConfig):
        name: Literal["shapes"] = "shapes"
        num_train: int = Field(default=6000, ge=1)
        """Images in the train split."""
        num_test: int = Field(default=1000, ge=1)
        """Images in the test split."""
        seed: int = Field(default=0, ge=0)
        """Seed of the images."""

    options: Options

    def __init__(self, options: Options, *, size: tuple[int, int] | None = None, channels: int = 3) -> None:
        super().__init__(options, size=size or (32, 32), channels=channels)
        if size and min(size) < MIN_SIDE:
            raise DataError(
                f"data.image_size {size[0]} x {size[1]} is too small for the source 'shapes', which draws at "
                f"{MIN_SIDE} x {MIN_SIDE} or more"
            )

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(SHAPES)

    def num_images(self, split: Split) -> int:
        return self.options.num_train if split == "train" else self.options.num_test

    def _read(self, split: Split) -> Iterator[Example]:
        assert self.size is not None
        num = self.num_images(split)
        for start in range(0, num, CHUNK):
            seed = np.random.SeedSequence([self.options.seed, int(split == "test"), start // CHUNK])
            images = _draw(np.random.default_rng(seed), min(CHUNK, num - start), self.size)
            if self.channels == 1:
                images = to_grayscale(images)
            for i, image in enumerate(images, start):
                yield Example(f"shapes {split} image {i}", i % len(SHAPES), image)


def _draw(rng: np.random.Generator, num: int, size: tuple[int, int]) -> Pixels:
    """Draw the first ``num`` images of a chunk, classes in turn, as uint8 (num, H, W, 3).

    Pixels depend only on operations that IEEE 754 rounds uniquely (no sine, no sum over an axis), so that every machine
    draws the same bytes.
    """
    height, width = size
    # Parameters come first and for the whole chunk, pixel noise last: a shorter chunk is a prefix of a longer one.
    parameters = iter(rng.random((CHUNK, NUM_PARAMETERS))[:num].T)
    noise = rng.integers(0, 256, (num, height, width, 3), dtype=np.uint8)

    def uniform(low: float | Vector, high: float | Vector) -> Vector:
        values: Vector = low + (high - low) * next(parameters)
        return values

    radius = uniform(0.27, 0.42) * min(size)
    margin = 1.1 * radius  # reach of the corners of a rotated shape
    center_x = uniform(margin, width - margin)
    center_y = uniform(margin, height - margin)
    angle = uniform(-0.26, 0.26)
    cos, sin = (_column(np.round(f(angle), 6) / radius) for f in (np.cos, np.sin))
    dx = np.arange(width, dtype=np.float32)[None, None, :] + 0.5 - _column(center_x)
    dy = _column(center_y) - 0.5 - np.arange(height, dtype=np.float32)[None, :, None]
    x, y = cos * dx + sin * dy, cos * dy - sin * dx  # axes of the shape: y up, about 1 at its edge

    # The brightness of background and shape differs clearly; their hues are independent.
    dark, light = uniform(0.12, 0.42), uniform(0.62, 0.92)
    shape_is_light = next(parameters) < 0.5
    shape_luma = np.where(shape_is_light, light, dark)
    background_luma = np.where(shape_is_light, dark, light)
    shape_color = [shape_luma + c for c in _chroma([uniform(-1, 1) for _ in range(3)], uniform(0.1, 0.45))]
    chroma = _chroma([uniform(-1, 1) for _ in range(3)], uniform(0.05, 0.35))
    # Smooth interpolation of a 3 x 3 grid of colors around one base color gives gradients, vignettes and soft blobs.
    grid = [[[background_luma + c + uniform(-0.13, 0.13) for c in chroma] for _ in range(3)] for _ in range(3)]
    shade = _column(uniform(-0.1, 0.1)) * y  # light on the shape from above or below
    coverage = _coverage(x, y, radius)
    columns, rows = _knot_weights(width), _knot_weights(height)

    images = np.empty((num, height, width, 3), dtype=np.uint8)
    for channel in range(3):
        lines = [sum(_column(grid[r][c][channel]) * columns[c] for c in range(3)) for r in range(3)]
        background = sum(lines[r] * rows[r][:, None] for r in range(3))
        foreground = _column(shape_color[channel]) + shade
        color = background + coverage * (foreground - background)
        color += (noise[..., channel].astype(np.float32) - np.float32(127.5)) * np.float32(0.07 / 255)
        images[..., channel] = np.clip(np.rint(color * np.float32(255)), 0, 255)
    return images


def _coverage(x: Plane, y: Plane, radius: Vector) -> Plane:
    """Return the fraction of each pixel that the shape covers, classes in turn."""
    coverage = np.empty(x.shape, dtype=np.float32)
    for label, distance in enumerate(SHAPES.values()):
        of_class = slice(label, None, len(SHAPES))
        edge = distance(x[of_class], y[of_class]) * _column(radius[of_class])
        coverage[of_class] = np.clip(np.float32(0.5) - edge, 0, 1)
    return coverage


def _column(values: Vector) -> Plane:
    """Return per-image values as float32 (N, 1, 1)."""
    return values.astype(np.float32)[:, None, None]


def _chroma(direction: list[Vector], amount: Vector) -> list[Vector]:
    """Return three per-channel offsets that keep the luma; the largest has the absolute value ``amount``."""
    luma = sum(weight * d for weight, d in zip(LUMA, direction, strict=True))
    offsets = [d - luma for d in direction]
    largest = np.maximum(np.maximum(*np.abs(offsets[:2])), np.abs(offsets[2]))
    return [amount * offset / largest for offset in offsets]


def _knot_weights(num: int) -> list[npt.NDArray[np.float32]]:
    """Return the smooth weights (num,) of three knots at the start, middle and end of a line; they sum to 1."""
    position = (np.arange(num, dtype=np.float32) + np.float32(0.5)) * np.float32(2 / num)
    hats = [np.clip(1 - np.abs(position - np.float32(knot)), 0, 1) for knot in range(3)]
    return [hat * hat * (3 - 2 * hat) for hat in hats]


# Signed distances from the edge, negative inside. x and y are coordinates in the shape's axes.


def _circle(x: Plane, y: Plane) -> Plane:
    return np.sqrt(x * x + y * y) - np.float32(0.9)


def _ring(x: Plane, y: Plane) -> Plane:
    return np.abs(np.sqrt(x * x + y * y) - np.float32(0.72)) - np.float32(0.2)


def _crescent(x: Plane, y: Plane) -> Plane:
    bite_x, bite_y = x - np.float32(0.42), y - np.float32(0.12)
    bite = np.sqrt(bite_x * bite_x + bite_y * bite_y) - np.float32(0.78)
    crescent: Plane = np.maximum(np.sqrt(x * x + y * y) - np.float32(0.98), -bite)
    return crescent


def _heart(x: Plane, y: Plane) -> Plane:
    one, scale = np.float32(1), np.float32(1.75)
    x, y = np.abs(x / scale), y / scale + np.float32(0.55)
    lobe_x, lobe_y = x - np.float32(0.25), y - np.float32(0.75)
    lobe = np.sqrt(lobe_x * lobe_x + lobe_y * lobe_y) - np.float32(math.sqrt(2) / 4)
    side = np.maximum(x + y, 0) * np.float32(0.5)
    to_dent, to_side = x * x + (y - one) * (y - one), (x - side) * (x - side) + (y - side) * (y - side)
    point = np.sqrt(np.minimum(to_dent, to_side)) * np.sign(x - y)
    heart: Plane = np.where(x + y > 1, lobe, point) * scale
    return heart


def _house(x: Plane, y: Plane) -> Plane:
    door = np.maximum(np.abs(x - np.float32(0.1)) - np.float32(0.2), np.abs(y + np.float32(0.62)) - np.float32(0.36))
    house: Plane = np.maximum(_polygon(x, y, HOUSE), -door)
    return house


def _polygon(x: Plane, y: Plane, corners: list[tuple[float, float]]) -> Plane:
    nearest = np.full_like(x, np.inf)
    inside = np.zeros(x.shape, dtype=bool)
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
        ex, ey = np.float32(bx - ax), np.float32(by - ay)
        px, py = x - np.float32(ax), y - np.float32(ay)
        along = np.clip((px * ex + py * ey) / (ex * ex + ey * ey), 0, 1)
        off_x, off_y = px - ex * along, py - ey * along
        nearest = np.minimum(nearest, off_x * off_x + off_y * off_y)
        if ey:
            # Even-odd rule: count the edges to the right of each pixel.
            inside ^= ((py < 0) != (y < np.float32(by))) & (px < ex / ey * py)
    distance = np.sqrt(nearest)
    return np.where(inside, -distance, distance)


SQUARE = [(-0.78, -0.78), (0.78, -0.78), (0.78, 0.78), (-0.78, 0.78)]
TRIANGLE = [(0.0, 0.98), (-0.98, -0.74), (0.98, -0.74)]
STAR = [
    (round(radius * math.sin(math.pi * k / 5), 6), round(radius * math.cos(math.pi * k / 5), 6))
    for k, radius in enumerate((1.08, 0.46) * 5)
]
HOUSE = [(-0.68, -0.95), (0.68, -0.95), (0.68, 0.12), (0.98, 0.12), (0.0, 0.98), (-0.98, 0.12), (-0.68, 0.12)]
ARROW = [(-1.0, -0.24), (0.1, -0.24), (0.1, -0.72), (1.0, 0.0), (0.1, 0.72), (0.1, 0.24), (-1.0, 0.24)]
CROSS = [
    *((-0.3, -0.96), (0.3, -0.96), (0.3, -0.3), (0.96, -0.3), (0.96, 0.3), (0.3, 0.3)),
    *((0.3, 0.96), (-0.3, 0.96), (-0.3, 0.3), (-0.96, 0.3), (-0.96, -0.3), (-0.3, -0.3)),
]

SHAPES = {
    "circle": _circle,
    "ring": _ring,
    "square": lambda x, y: _polygon(x, y, SQUARE),
    "triangle": lambda x, y: _polygon(x, y, TRIANGLE),
    "star": lambda x, y: _polygon(x, y, STAR),
    "cross": lambda x, y: _polygon(x, y, CROSS),
    "heart": _heart,
    "arrow": lambda x, y: _polygon(x, y, ARROW),
    "crescent": _crescent,
    "house": _house,
}
