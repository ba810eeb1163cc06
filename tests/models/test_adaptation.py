"""Adaptation networks: shapes, the layers of their sources, and that they read the images that they are for."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from raypp.models import ADAPTATIONS
from raypp.models.adaptation import Adaptation, AdaptedClassifier, ShuffledBlockAdaptation, build_classifier
from raypp.models.resnet import ResNetOptions
from raypp.protections import PROTECTIONS
from raypp.utils.keys import Key


@pytest.mark.parametrize("name", list(ADAPTATIONS))
@pytest.mark.parametrize(("channels", "size"), [(3, (32, 32)), (1, (16, 24))])
def test_images_keep_their_size(name: str, channels: int, size: tuple[int, int]) -> None:
    net: Adaptation = ADAPTATIONS.get(name)(channels, size)
    images = torch.rand(2, channels, *size)
    assert net(images).shape == (2, net.channels_out, *size)
    logits = build_classifier(ResNetOptions(), name, num_classes=7, channels=channels, image_size=size)(images)
    assert logits.shape == (2, 7)


def test_every_protection_names_an_adaptation_that_there_is() -> None:
    assert {PROTECTIONS.get(name).adaptation for name in PROTECTIONS} <= {"none", *ADAPTATIONS}


def test_parameters_of_the_block_network_follow_from_its_layers() -> None:
    net = ADAPTATIONS.get("block")(3, (32, 32))
    expected = 2 * 3 + (48 * 48 + 48) + 2 * 48 + (48 * 48 + 48) + 2 * 48 + (48 * 512 + 512)
    assert sum(p.numel() for p in net.parameters()) == expected


def test_the_block_network_sees_one_block_at_a_time() -> None:
    net = ADAPTATIONS.get("block")(3, (16, 16)).eval()
    images = torch.rand(1, 3, 16, 16)
    changed = images.clone()
    changed[:, :, 4:8, 8:12] = 0
    difference = (net(images) - net(changed)).abs().sum((0, 1)) > 0
    assert difference[4:8, 8:12].any()
    difference[4:8, 8:12] = False
    assert not difference.any()


def test_per_block_weights_are_divided_by_their_largest_singular_value() -> None:
    torch.manual_seed(0)
    net = ShuffledBlockAdaptation(3, (8, 8))
    images = torch.rand(4, 3, 8, 8)
    for _ in range(60):  # one power iteration per step
        net(images)
    largest = torch.linalg.matrix_norm(net._normalized_weight(), ord=2)
    torch.testing.assert_close(largest, torch.ones(4), rtol=0.02, atol=0)


def test_the_penalty_prefers_permutations_and_smooth_features() -> None:
    net = ShuffledBlockAdaptation(3, (8, 8))
    net.train()
    images = torch.rand(4, 3, 8, 8)

    def l12(matrix: torch.Tensor) -> float:
        """l1 - l2 of every row and column, over the number of blocks."""
        return sum(float(v.abs().sum() - v.norm()) for m in (matrix, matrix.t()) for v in m) / len(matrix)

    def parts() -> tuple[float, float]:
        net(images)
        features, total = net._features, net.penalty()
        assert features is not None
        assert total is not None
        across = (features[..., 1:] - features[..., :-1]).abs().mean()
        down = (features[..., 1:, :] - features[..., :-1, :]).abs().mean()
        return float(total.detach()), float(0.1 * (across + down).detach())

    total, variation = parts()
    mixed = torch.full((4, 4), 1 / 4) + 0.1 * torch.eye(4)
    assert total - variation == pytest.approx(1e-3 * l12(mixed / mixed.sum(1, keepdim=True)), abs=1e-5)
    with torch.no_grad():
        net.mix.copy_(torch.eye(4)[[2, 0, 3, 1]])
    total, variation = parts()
    assert total - variation == pytest.approx(0, abs=1e-5)
    net.eval()(images)
    assert net.penalty() is None


def test_shuffled_blocks_can_be_put_back() -> None:
    """With ELE's permutation as its matrix, the network puts each block's features back in its place."""
    net = ShuffledBlockAdaptation(3, (8, 8)).eval()
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        net.weight.copy_(net.weight[:1].expand_as(net.weight))
        net.left.copy_(net.left[:1].expand_as(net.left))
        net.mix.copy_(torch.eye(4))
        images = torch.rand(1, 3, 8, 8)
        blocks = F.unfold(images, 4, stride=4)
        shuffled = F.fold(blocks[:, :, order], (8, 8), 4, stride=4)
        straight = net(images)
        net.mix.copy_(torch.eye(4)[torch.argsort(order)])
        torch.testing.assert_close(net(shuffled), straight)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tanaka", "ele", "etc", "pixel"])
def test_a_classifier_learns_through_every_keyed_protection(name: str) -> None:
    """Sixteen random pictures, one per class, are classified after protection."""
    torch.manual_seed(0)
    protection = PROTECTIONS.build(PROTECTIONS.options(name)(name=name), channels=3, key=Key(bytes(32)))
    images = protection.protect(torch.randint(0, 256, (16, 3, 16, 16), dtype=torch.uint8)).float() / 255
    labels = torch.arange(16)
    options = ResNetOptions(width=4)
    net = build_classifier(options, protection.adaptation, num_classes=16, channels=3, image_size=(16, 16))
    assert isinstance(net, AdaptedClassifier)
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3)
    loss = torch.tensor(math.inf)
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(images), labels)
        penalty = net.penalty()
        (loss if penalty is None else loss + penalty).backward()
        optimizer.step()
    assert float(loss.detach()) < 0.5
