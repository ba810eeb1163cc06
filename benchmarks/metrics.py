"""How fast PSNR and SSIM are: raypp's on batches against scikit-image image by image, in one run, interleaved.

Both measure the same pairs of random images, and what they give is compared to 1e-4 on the
first 1,000. Ours is also timed with the attacks' other metrics: re-identification among as many images, and correlation
of edges.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from _common import describe, finish, interleave, machine, ratio, show_table
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from raypp.metrics.image import edge_correlation, psnr, ssim
from raypp.metrics.retrieval import reidentify

SIDE = 32
TOLERANCE = 1e-4
WANG = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}


def images(num: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of uint8 images (num, 32, 32, 3): smooth ones, and the same with noise."""
    random = np.random.default_rng(0)
    coarse = torch.from_numpy(random.random((num, 3, 8, 8), dtype=np.float32))
    smooth = torch.nn.functional.interpolate(coarse, size=(SIDE, SIDE), mode="bilinear")
    first = (smooth.permute(0, 2, 3, 1).numpy() * 255).round()
    second = (first + random.normal(0, 20, first.shape)).clip(0, 255)
    return first.astype(np.uint8), second.round().astype(np.uint8)


def as_float(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def one_by_one(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """PSNR and SSIM (num, 2) by scikit-image."""
    return np.array(
        [
            (
                peak_signal_noise_ratio(a, b, data_range=255),
                structural_similarity(a, b, channel_axis=2, data_range=255, **WANG),
            )
            for a, b in zip(first, second, strict=True)
        ]
    )


def together(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """PSNR and SSIM (num, 2) by raypp, from the same uint8 images."""
    a, b = as_float(first), as_float(second)
    return torch.stack((psnr(a, b), ssim(a, b)), dim=1).numpy()


def speed(work: Callable[[], object], num: int) -> Callable[[], float]:
    def measure() -> float:
        began = time.perf_counter()
        work()
        return num / (time.perf_counter() - began)

    return measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=10_000, help="pairs of images (default: 10000)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write what was measured to this file")
    options = parser.parse_args()
    first, second = images(options.num)
    few = slice(0, 1000)
    difference = np.abs(one_by_one(first[few], second[few]) - together(first[few], second[few])).max()
    assert difference < TOLERANCE, f"the two differ by {difference}"
    a, b = as_float(first), as_float(second)
    truth, labels = torch.arange(options.num), torch.zeros(options.num, dtype=torch.int64)
    start = machine()
    print(describe(start))
    speeds = interleave(
        {
            "scikit-image, image by image": speed(lambda: one_by_one(first, second), options.num),
            "raypp, PSNR and SSIM": speed(lambda: together(first, second), options.num),
            "raypp, re-identification": speed(lambda: reidentify(a, b, truth, labels), options.num),
            "raypp, edges": speed(lambda: edge_correlation(a, b), options.num),
        },
        options.rounds,
    )
    reference = speeds["scikit-image, image by image"]
    rows, results = [], {}
    for name, spread in speeds.items():
        comparable = name == "raypp, PSNR and SSIM"
        gain = ratio(spread, reference) if comparable else None
        rows.append([name, f"{spread.median:,.0f}", str(spread), f"{gain.median:.1f} ({gain})" if gain else ""])
        results[name] = spread.to_json() | ({"ratio": gain.to_json()} if gain else {})
    show_table(
        f"{options.num:,} pairs of {SIDE} x {SIDE} images, {options.rounds} rounds, "
        f"largest difference {difference:.1e}",
        ["", "images/s, median", "min - max", "times scikit-image (min - max)"],
        rows,
    )
    finish(options.json, "metrics", start, results)


if __name__ == "__main__":
    main()
