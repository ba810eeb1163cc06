"""The differentiable JPEG against Pillow's."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from raypp.data.shapes import Shapes
from raypp.models.jpeg import jpeg
from raypp.protections.learned import Learned
from raypp.utils.images import jpeg_roundtrip


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    return Shapes(Shapes.Options(num_test=20), size=(37, 30), channels=3).load("test").images


def by_pillow(images: np.ndarray, quality: int, subsampling: int) -> np.ndarray:
    decoded = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=quality, subsampling=subsampling)
        decoded.append(np.asarray(Image.open(file)))
    return np.stack(decoded).astype(np.float64)


@pytest.mark.parametrize("quality", [95, 75, 30])
@pytest.mark.parametrize("subsample", [True, False])
def test_it_does_what_pillow_does(pictures: np.ndarray, quality: int, subsample: bool) -> None:
    reference = by_pillow(pictures, quality, 2 if subsample else 0)
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255
    actual = 255 * jpeg(images, quality, subsample=subsample).permute(0, 2, 3, 1).double().numpy()
    # Codecs differ in how they round and upsample; what they do to the pictures is several times larger.
    assert np.abs(actual - reference).mean() < min(1.3, 0.35 * np.abs(pictures - reference).mean())


def test_grey_pictures(pictures: np.ndarray) -> None:
    gray = pictures[..., :1]
    reference = jpeg_roundtrip(gray, 50).astype(np.float64)
    actual = 255 * jpeg(torch.from_numpy(gray).permute(0, 3, 1, 2) / 255, 50).permute(0, 2, 3, 1).double().numpy()
    assert np.abs(actual - reference).mean() < 0.3


def test_gradients_pass(pictures: np.ndarray) -> None:
    images = (torch.from_numpy(pictures[:2]).permute(0, 3, 1, 2) / 255).requires_grad_()
    (jpeg(images, 75) * torch.linspace(0, 1, 30)).sum().backward()
    assert images.grad is not None
    assert images.grad.isfinite().all()
    # A sum over the picture, where nothing is clipped away, is as steep as it would be without the codec.
    assert images.grad.mean() == pytest.approx(0.5, abs=0.1)


def test_half_of_a_batch_arrives_as_it_is() -> None:
    protection = Learned(Learned.Options(width=2, depth=1, jpeg=10))
    protected = torch.rand(6, 3, 16, 16)
    arrived = protection.transmitted(protected)
    assert torch.equal(arrived[3:], protected[3:])
    assert (arrived[:3] - protected[:3]).abs().mean() > 0.01
    assert Learned(Learned.Options(width=2, depth=1)).transmitted(protected) is protected
