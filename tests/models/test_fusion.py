"""Batch normalisation folded into convolutions."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from torch import Tensor, nn

from raypp.models import CLASSIFIERS
from raypp.models.fusion import fuse_conv_bn


def normalised(network: nn.Module) -> nn.Module:
    """Return a network with running statistics of images."""
    network.train()
    with torch.no_grad():
        for _ in range(3):
            network(torch.rand(16, 3, 32, 32))
    return network.eval()


def num_left(network: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "vgg16_bn" else name for name in CLASSIFIERS]
)
def test_a_folded_classifier_answers_the_same(name: str) -> None:
    torch.manual_seed(0)
    network = normalised(CLASSIFIERS.build(CLASSIFIERS.options(name)(), num_classes=10))
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    without = fuse_conv_bn(network, torch.rand(4, 3, 32, 32))
    images = torch.rand(8, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(without(images), network(images), rtol=1e-4, atol=1e-4)
    assert num_left(network) > num_left(without) == 0
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())


class Shared(nn.Module):
    """One convolution in front of two normalisations, and one whose output is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.other = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.one, self.two, self.three = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.other(x)
        output: Tensor = self.one(self.conv(x)) + self.two(self.conv(x)) + y + self.three(y)
        return output


class OfTheBatch(nn.Module):
    """Normalises by the batch at hand."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.bn(self.conv(x))
        return output


@pytest.mark.parametrize("kind", [Shared, OfTheBatch])
def test_other_layers_are_not_fused(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    network = normalised(kind())
    images = torch.rand(4, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(fuse_conv_bn(network, images)(images), network(images))
    assert num_left(fuse_conv_bn(network, images)) == num_left(network)


@pytest.mark.slow
def test_other_threads_compute_meanwhile() -> None:
    """A replica fuses the next bundle's classifier while it serves the active one."""
    torch.manual_seed(0)
    network = normalised(CLASSIFIERS.build(CLASSIFIERS.options("resnet20")(), num_classes=10))
    images = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        expected = network(images)
    stop, passes, failures = threading.Event(), 0, []

    def answer() -> None:
        nonlocal passes
        while not stop.is_set():
            try:
                with torch.inference_mode():
                    if not torch.allclose(network(images), expected, atol=1e-4):
                        failures.append("another answer")
            except Exception as error:
                failures.append(repr(error))
            passes += 1

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    for _ in range(5):
        before = passes
        fuse_conv_bn(network, images)
        while passes < before + 3:
            time.sleep(0.01)
    stop.set()
    thread.join()
    assert failures == []
