"""The baseline that a search compares with."""

from __future__ import annotations

import pytest
import torch

from raypp.attacks.base import AttackerKnowledge
from raypp.attacks.target import Target
from raypp.evaluation import baselines


@pytest.fixture
def target(monkeypatch: pytest.MonkeyPatch) -> Target:
    monkeypatch.setattr(baselines, "FIT_STEPS", 3)
    images = torch.randint(0, 256, (30, 3, 12, 12), dtype=torch.uint8)
    access = AttackerKnowledge((3, 12, 12), images=images[:20], labels=torch.arange(20) % 2)
    plain, labels = images[20:], torch.arange(10) % 3  # no image of the third class is the attacker's
    return Target("x", "x", access, plain, 255 - plain, labels, plain, labels, torch.arange(10), ("a", "b", "c"))


def test_the_fitted_class_image_is_computed_without_the_other_baselines(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = baselines.baselines(target, seed=4)[baselines.CLASS_IMAGE]
    monkeypatch.setattr(baselines, "_nearest", None)
    assert torch.equal(baselines.fitted_class_image(target, seed=4), expected)


def test_a_class_without_images_has_the_mean_of_all(target: Target) -> None:
    estimates = baselines.baselines(target)
    assert torch.equal(estimates["class mean"][2], estimates["mean image"][2])
    assert not torch.equal(estimates["class mean"][1], estimates["mean image"][1])
