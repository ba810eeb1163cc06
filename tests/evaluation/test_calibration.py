"""What standard reconstructions score on real photographs: a scale to read every other score by.

The published table (PSNR in dB, SSIM with scikit-image's defaults, SSIM as Wang 2004) is of 1,000 CIFAR-10 images and a
key that it does not name. Ours are the first 1,000 of the test split, so means may differ by what drawing two samples
makes them differ: four standard errors of the difference, and rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from methods import build, victim
from torch import Tensor

from raypp.attacks.base import AttackerKnowledge
from raypp.metrics.image import psnr, ssim, ssim_lab
from raypp.utils.images import decode
from raypp.utils.keys import Key

SHARED = ROOT.parent / "shared" / "data" / "cifar10"
NUM = 1000

pytestmark = pytest.mark.skipif(not SHARED.exists(), reason="the shared CIFAR-10 is not at hand")

Images = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(scope="module")
def cifar() -> Images:
    """1,000 test images and their classes, 5,000 training images and theirs; uint8 (N, C, H, W)."""
    tensors: list[Tensor] = []
    for split, num in (("test", NUM), ("train", 5 * NUM)):
        (file,) = SHARED.glob(f"{split}-*.parquet")
        rows = pq.read_table(file).slice(0, num)
        images = np.stack([decode(cell["bytes"], name=split) for cell in rows["img"].to_pylist()])
        tensors += [torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.tensor(rows["label"].to_pylist())]
    return tensors[0], tensors[1], tensors[2], tensors[3]


def constant(value: float) -> Callable[[Images], Tensor]:
    return lambda cifar: torch.full(cifar[0].shape, value)


def mean_image(cifar: Images) -> Tensor:
    return cifar[2].double().mean(0).expand(NUM, -1, -1, -1)


def class_mean(cifar: Images) -> Tensor:
    _, labels, train, train_labels = cifar
    means = torch.stack([train[train_labels == c].double().mean(0) for c in range(10)])
    return means[labels]


def mosaic(side: int) -> Callable[[Images], Tensor]:
    """Of side x side squares."""

    def made(cifar: Images) -> Tensor:
        coarse = F.adaptive_avg_pool2d(cifar[0].double(), side)
        return F.interpolate(coarse, size=cifar[0].shape[2:], mode="nearest").round()

    return made


def nearest(cifar: Images) -> Tensor:
    """Of 3,000 training images."""
    own = cifar[2][:3000].flatten(1).float()
    return cifar[2][torch.cdist(cifar[0].flatten(1).float(), own).argmin(1)]


def feature_reconstruction(cifar: Images) -> Tensor:
    protected = victim("pixel", Key(bytes(32))).protect(cifar[0])
    return build("feature_reconstruction", AttackerKnowledge((3, 32, 32))).reconstruct(protected)


TABLE: dict[str, tuple[Callable[[Images], Tensor], tuple[float, float, float]]] = {
    "random other image": (lambda cifar: cifar[2][:NUM], (9.76, 0.044, 0.047)),
    "grey": (constant(128), (12.43, 0.113, 0.120)),
    "mean of the training images": (mean_image, (12.63, 0.117, 0.124)),
    "mean of the class": (class_mean, (12.98, 0.130, 0.134)),
    "mean colour": (mosaic(1), (14.23, 0.122, 0.128)),
    "nearest of 3,000 training images": (nearest, (14.93, 0.206, 0.193)),
    "mosaic 2 x 2": (mosaic(2), (15.39, 0.151, 0.152)),
    "mosaic 4 x 4": (mosaic(4), (17.43, 0.298, 0.277)),
    "mosaic 8 x 8": (mosaic(8), (20.13, 0.594, 0.526)),
    "mosaic 16 x 16": (mosaic(16), (24.46, 0.856, 0.826)),
    "feature reconstruction of PE": (feature_reconstruction, (12.00, 0.314, 0.328)),
    "negative": (lambda cifar: 255 - cifar[0], (6.42, -0.648, -0.630)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLE)
def test_standard_reconstructions_score_as_published(name: str, cifar: Images) -> None:
    made, published = TABLE[name]
    estimates, plain = made(cifar).double() / 255, cifar[0].double() / 255
    for metric, expected, rounding in zip((psnr, ssim_lab, ssim), published, (0.005, 0.0005, 0.0005), strict=True):
        values = metric(estimates, plain).double().numpy()
        error = 4 * np.sqrt(2) * values.std() / np.sqrt(NUM)
        assert abs(values.mean() - expected) <= error + rounding, (metric.__name__, values.mean(), expected, error)


CIPHERS: dict[str, tuple[str, dict[str, bool], tuple[float, float, float]]] = {
    "LE": ("tanaka", {}, (8.66, 0.006, 0.011)),
    "ELE": ("ele", {}, (8.82, 0.010, 0.011)),
    "PE": ("pixel", {}, (9.45, 0.040, 0.046)),
    "PE with colours shuffled": ("pixel", {"shuffle_color_channels": True}, (9.46, 0.032, 0.038)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CIPHERS)
def test_protected_images_score_as_published(name: str, cifar: Images) -> None:
    """One key gives other means than the next; the published ones are of one, ours of eight."""
    scheme, options, published = CIPHERS[name]
    chosen = cifar[0][::5]
    plain = chosen.double() / 255
    protected = [victim(scheme, Key(bytes([i] * 32)), **options).protect(chosen).double() / 255 for i in range(8)]
    for metric, expected, rounding in zip((psnr, ssim_lab, ssim), published, (0.005, 0.0005, 0.0005), strict=True):
        values = np.stack([metric(images, plain).double().numpy() for images in protected])
        of_keys = values.mean(1)
        error = 4 * np.sqrt(of_keys.var(ddof=1) * (1 + 1 / 8) + 6 * values.var() / NUM)
        assert abs(of_keys.mean() - expected) <= error + rounding, (metric.__name__, of_keys, expected, error)
        assert error < {"psnr": 2.0}.get(metric.__name__, 0.12), "it could not fail"
