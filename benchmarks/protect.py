"""How fast each protection is: images/s of ``protect`` on batches against a loop over images, in one run, interleaved.

The loop of a keyed scheme is NumPy, written the straightforward way: image by image, block by block, as the schemes are
described. It uses the same key, and eight of its images are checked to be the same, byte by byte. For the trained
networks the loop calls the same network with one image at a time. A common key is expanded once, before the
measurement, on both sides; with a key per image expanding it is part of the work on both.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from itertools import permutations, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import Spread, describe, finish, interleave, machine, ratio, show_table

from raypp.protections import PROTECTIONS
from raypp.protections.base import Protection
from raypp.utils.keys import Key

Image = np.ndarray
PerImage = Callable[[Image], Image]
SIDE, BLOCK = 32, 4
GRID = SIDE // BLOCK
NUM_BLOCKS = GRID**2
KEY = Key(bytes(range(32)))
SIZE = f"{SIDE} x {SIDE}"
CASES: dict[str, dict[str, Any]] = {
    "tanaka": {"name": "tanaka"},
    "ele": {"name": "ele"},
    "pixel": {"name": "pixel"},
    "pixel, colour shuffle": {"name": "pixel", "shuffle_color_channels": True},
    "pixel, key per image": {"name": "pixel", "keys": "per_image"},
    "etc": {"name": "etc"},
    "learned, width 16": {"name": "learned", "width": 16, "depth": 3},
    "learned, code, width 32": {"name": "learned", "width": 32, "depth": 3, "skips": 0, "code": {"size": 6}},
    "learned, code, width 16": {"name": "learned", "width": 16, "depth": 3, "skips": 0, "code": {"size": 6}},
    "learned, code, ResNet-20": {
        "name": "learned",
        "width": 16,
        "depth": 3,
        "skips": 0,
        "code": {"size": 6, "encoder": {"name": "resnet20"}},
    },
    "learned, code of classes, ResNet-20": {
        "name": "learned",
        "width": 16,
        "depth": 3,
        "skips": 0,
        "code": {"classes": 10, "size": 2, "encoder": {"name": "resnet20"}},
    },
    "learned, width 64 (the paper's)": {"name": "learned", "width": 64, "depth": 4},
    "gan, width 16": {"name": "gan", "width": 16},
}


def scramble(block: Image, order: np.ndarray, inverted: np.ndarray) -> Image:
    """LE of one block."""
    flat = block.reshape(-1)
    halves = np.concatenate((flat & 15, flat >> 4))[order]
    halves[inverted] = 15 - halves[inverted]
    num = len(flat)
    merged: Image = ((halves[num:] << 4) + halves[:num]).reshape(block.shape)
    return merged


def at(image: Image, index: int) -> Image:
    y, x = divmod(index, GRID)
    return image[y * BLOCK : (y + 1) * BLOCK, x * BLOCK : (x + 1) * BLOCK]


def tanaka() -> PerImage:
    order = KEY.permutations("tanaka order", 1, 96)[0]
    inverted = KEY.bits("tanaka inversion", 96).astype(bool)

    def protect(image: Image) -> Image:
        protected = np.empty_like(image)
        for index in range(NUM_BLOCKS):
            at(protected, index)[:] = scramble(at(image, index), order, inverted)
        return protected

    return protect


def ele() -> PerImage:
    orders = KEY.permutations(f"ele orders {SIZE}", NUM_BLOCKS, 96)
    inverted = KEY.bits(f"ele inversions {SIZE}", NUM_BLOCKS * 96).reshape(NUM_BLOCKS, 96).astype(bool)
    blocks = KEY.permutations(f"ele blocks {SIZE}", 1, NUM_BLOCKS)[0]

    def protect(image: Image) -> Image:
        protected = np.empty_like(image)
        for index, source in enumerate(blocks):
            at(protected, index)[:] = scramble(at(image, source), orders[source], inverted[source])
        return protected

    return protect


def pixel(shuffle_color_channels: bool) -> PerImage:
    inverted = KEY.bits(f"pixel inversions {SIZE}", SIDE * SIDE * 3).reshape(SIDE, SIDE, 3)
    colours = KEY.integers(f"pixel colours {SIZE}", SIDE * SIDE, 6).reshape(SIDE, SIDE)
    orders = [list(order) for order in permutations(range(3))]

    def protect(image: Image) -> Image:
        protected = np.empty_like(image)
        for y, x in product(range(SIDE), range(SIDE)):
            value = image[y, x]
            if shuffle_color_channels:
                value = value[orders[colours[y, x]]]
            protected[y, x] = np.where(inverted[y, x], 255 - value, value)
        return protected

    return protect


def pixel_per_image(image: Image) -> Image:
    protected = np.empty_like(image)
    inverted = Key.generate().bits("inversions", image.size).reshape(image.shape)
    for y, x in product(range(SIDE), range(SIDE)):
        protected[y, x] = np.where(inverted[y, x], 255 - image[y, x], image[y, x])
    return protected


def etc() -> PerImage:
    flips: tuple[PerImage, ...] = (lambda x: x, lambda x: x[::-1], lambda x: x[:, ::-1])
    moves = list(product(range(4), flips, permutations(range(3))))
    chosen = KEY.integers(f"etc moves {SIZE}", NUM_BLOCKS, len(moves))
    inverted = KEY.bits(f"etc inversions {SIZE}", NUM_BLOCKS)
    blocks = KEY.permutations(f"etc blocks {SIZE}", 1, NUM_BLOCKS)[0]

    def protect(image: Image) -> Image:
        protected = np.empty_like(image)
        for index, source in enumerate(blocks):
            turns, flip, order = moves[chosen[source]]
            block = flip(np.rot90(at(image, source), turns))[:, :, list(order)]
            at(protected, index)[:] = 255 - block if inverted[source] else block
        return protected

    return protect


LOOPS: dict[str, Callable[[], PerImage]] = {
    "tanaka": tanaka,
    "ele": ele,
    "pixel": lambda: pixel(False),
    "pixel, colour shuffle": lambda: pixel(True),
    "pixel, key per image": lambda: pixel_per_image,
    "etc": etc,
}


def one_by_one(protection: Protection) -> PerImage:
    """A network called with one image at a time."""

    def protect(image: Image) -> Image:
        protected = protection.protect(torch.from_numpy(image).permute(2, 0, 1)[None])
        return protected[0].permute(1, 2, 0).numpy()

    return protect


def speed(work: Callable[[], int], seconds: float) -> float:
    """Images/s of ``work``, which returns how many it has done."""
    done, began = 0, time.perf_counter()
    while (spent := time.perf_counter() - began) < seconds:
        done += work()
    return done / spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="length of one measurement")
    parser.add_argument("--batch", type=int, default=256, help="images per call of protect")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    start = machine()
    print(describe(start) + "\n")
    images = np.random.default_rng(0).integers(0, 256, (options.batch, SIDE, SIDE, 3), dtype=np.uint8)
    batch = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    contestants: dict[str, Callable[[], float]] = {}
    cases = {case: settings for case, settings in CASES.items() if options.only in case}
    if not cases:
        parser.error(f"--only is {options.only!r}; the cases are {', '.join(CASES)}")
    for case, settings in cases.items():
        torch.manual_seed(0)
        chosen = PROTECTIONS.options(settings["name"]).model_validate(settings)
        protection: Protection = PROTECTIONS.build(chosen, channels=3, key=KEY).eval()
        loop = LOOPS[case]() if case in LOOPS else one_by_one(protection)
        batched = protection.protect(batch[:8]).permute(0, 2, 3, 1).numpy()
        if case in LOOPS and PROTECTIONS.get(chosen.name).needs_key(chosen):
            assert all(np.array_equal(loop(i), b) for i, b in zip(images[:8], batched, strict=True)), case
        contestants[case] = _batches(protection, batch, options.seconds)
        contestants[f"{case}: loop"] = _loop(loop, images, options.seconds)
    spreads: dict[str, Spread] = interleave(contestants, options.rounds)
    ratios = {case: ratio(spreads[case], spreads[f"{case}: loop"]) for case in cases}
    rows = [
        [
            case,
            f"{spreads[case].median:,.0f}",
            str(spreads[case]),
            f"{spreads[f'{case}: loop'].median:,.0f}",
            str(spreads[f"{case}: loop"]),
            f"{ratios[case].median:,.1f}",
            str(ratios[case]),
        ]
        for case in cases
    ]
    columns = ["32 x 32 RGB", "images/s", "min - max", "loop images/s", "min - max", "ratio", "min - max"]
    show_table(
        f"protect, batches of {options.batch}, {options.threads} thread(s), {options.rounds} rounds", columns, rows
    )
    finish(
        options.json,
        "protect",
        start,
        {
            "images_per_s": {k: v.to_json() for k, v in spreads.items()},
            "ratio": {k: v.to_json() for k, v in ratios.items()},
        },
    )


def _batches(protection: Protection, batch: torch.Tensor, seconds: float) -> Callable[[], float]:
    return lambda: speed(lambda: len(protection.protect(batch)), seconds)


def _loop(loop: PerImage, images: Image, seconds: float) -> Callable[[], float]:
    position = iter(range(10**9))
    return lambda: speed(lambda: len(loop(images[next(position) % len(images)])[:1]), seconds)


if __name__ == "__main__":
    main()
