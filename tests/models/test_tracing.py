"""Recorded forward passes give the module's own outputs at every batch size, or are not used."""

from __future__ import annotations

import pytest
import torch
from conftest import Trained
from torch import Tensor, nn

from raypp.bundle import guard
from raypp.bundle.guard import PlainImageDetector, trace_detector
from raypp.bundle.load import load_private
from raypp.models.tracing import trace_forward
from raypp.serve.loaded_model import load_model


class Branches(nn.Module):
    """Its output for one image is of another kind."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) if len(images) > 1 else images.flatten(1).double() + 1


class Fails(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        if torch.jit.is_tracing():
            raise RuntimeError("no recording")
        return images.flatten(1)


@pytest.mark.parametrize("module", [Branches(), Fails()])
def test_a_pass_that_cannot_be_recorded_is_not(module: nn.Module) -> None:
    assert trace_forward(module, torch.rand(8, 1, 2, 2)) is module


def test_too_few_images_are_not_recorded() -> None:
    module = nn.Flatten()
    assert trace_forward(module, torch.rand(0, 1, 2, 2)) is module


def test_a_served_model_is_recorded_and_answers_as_the_bundle(trained: Trained) -> None:
    """Else it would wait for Python's lock at each of its operations."""
    model, private = load_model(trained.bundle), load_private(trained.bundle)
    assert isinstance(model.private.classifier, torch.jit.ScriptModule)
    images = torch.cat([private.sample] * 9)[:65]
    for size in (1, 3, 8, 64, 65):
        with torch.inference_mode():
            expected = torch.softmax(private.classifier(images[:size].float() / 255), dim=1)
        torch.testing.assert_close(model.probabilities(images[:size]), expected, rtol=1e-3, atol=1e-4)


def test_a_guard_is_recorded_and_decides_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randint(256, (65, 3, 16, 16), dtype=torch.uint8)
    values = guard.statistics(images)
    weights = torch.randn(values.shape[1], dtype=torch.float64)
    detector = PlainImageDetector(values.mean(0), values.std(0) + 1e-6, weights, 0.1, 0.0, {}, {})
    traced = trace_detector(detector, images[:8])
    assert isinstance(traced.trace, torch.jit.ScriptModule)
    monkeypatch.setattr(guard, "PART_VALUES", 32 * 3 * 16 * 16)  # the last ones are three parts
    for size in (1, 3, 8, 32, 65):
        with torch.inference_mode():
            torch.testing.assert_close(traced.scores(images[:size]), detector.scores(images[:size]))
            assert torch.equal(traced.is_protected(images[:size]), detector.is_protected(images[:size]))
