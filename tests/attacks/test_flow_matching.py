"""Posterior samples: the path from noise to images, guidance by the protection, and the choice among samples."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch._dynamo  # the first optimizer imports it, for seconds
import torch.nn.functional as F
from methods import build
from torch import Tensor

from raypp.attacks.base import AttackerKnowledge, Threat
from raypp.attacks.flow_matching import FlowMatching, flow_matching_loss
from raypp.attacks.threat import threat_of
from raypp.data import SOURCES
from raypp.training.reporter import Reporter
from raypp.training.trainer import Trainer
from raypp.utils.progress import ProgressDisplay
from raypp.utils.storage import Storage

SMALL: dict[str, Any] = {"width": 4, "depth": 1, "samples": 3, "steps": 4}
SATURATION = 40.0


def images(num: int) -> Tensor:
    options = SOURCES.options("shapes").model_validate({"name": "shapes", "num_train": num, "num_test": 10})
    pixels = SOURCES.build(options, size=(16, 16), channels=3).load("train").images
    return F.avg_pool2d(torch.from_numpy(pixels).permute(0, 3, 1, 2).float(), 2).to(torch.uint8)


def logits_of(plain: Tensor) -> Tensor:
    return SATURATION * (plain.flip(3) - 0.5)


def saturated(plain: Tensor) -> Tensor:
    """A protection whose sigmoid is 0 or 1, without any gradient in float32, for most values."""
    return torch.sigmoid(logits_of(plain))


@torch.no_grad()
def protect(plain: Tensor) -> Tensor:
    return (saturated(plain.float() / 255) * 255).round().to(torch.uint8)


def knowledge(plain: Tensor, **changes: Any) -> AttackerKnowledge:
    labels = torch.zeros(len(plain), dtype=torch.int64)
    full = AttackerKnowledge((3, 8, 8), images=plain, labels=labels, protect=protect, gradients=saturated)
    return dataclasses.replace(full, **changes)


class ExactVelocity:
    """The velocity of straight paths that end in images (n, C, H, W) in [-1, 1]."""

    def __init__(self, ends: Tensor) -> None:
        self.ends = ends
        self.inputs = lambda protected: protected

    def __call__(self, noisy: Tensor, times: Tensor, _: Tensor) -> Tensor:
        return (self.ends - noisy) / (1 - times)[:, None, None, None]


def sampler(plain: Tensor, ends: Tensor, **options: Any) -> FlowMatching:
    changes = {"gradients": None} if options.get("guidance") is None else {}
    attack = build("flow_matching", knowledge(plain, **changes), **SMALL, **options)
    assert isinstance(attack, FlowMatching)
    attack._network = ExactVelocity(ends)  # type: ignore[assignment]
    return attack


@pytest.mark.parametrize("steps", [1, 7])
def test_an_exact_velocity_leads_to_its_image(steps: int) -> None:
    plain = images(6)
    attack = sampler(plain, plain.float() / 127.5 - 1)
    attack.options = attack.options.model_copy(update={"steps": steps})
    assert torch.equal(attack.reconstruct(protect(plain)), plain)


def test_the_loss_is_zero_for_the_exact_velocity_and_its_variance_for_none() -> None:
    plain, times = torch.rand(3, 3, 8, 8), torch.tensor([0.0, 0.5, 0.9])
    noise = torch.randn(plain.shape)
    assert flow_matching_loss(ExactVelocity(2 * plain - 1), plain, plain, times, noise).max() < 1e-9
    still = Mock(side_effect=lambda noisy, *_: torch.zeros_like(noisy))
    expected = (2 * plain - 1 - noise).square().mean(dim=(1, 2, 3))
    assert torch.allclose(flow_matching_loss(still, plain, plain, times, noise), expected)


def test_guidance_leads_wrong_samples_to_the_observed_image() -> None:
    """The prior predicts gray; the protection's gradients must bring the image back."""
    plain = images(6)
    gray = torch.zeros(plain.shape)
    errors = []
    for guidance in (0.0, 0.3):
        attack = sampler(plain, gray, guidance=guidance)
        difference = protect(attack.reconstruct(protect(plain))).float() - protect(plain).float()
        errors.append(float(difference.square().mean()))
    assert errors[1] < errors[0] / 2


def test_guidance_by_stated_logits_moves_saturated_values() -> None:
    """The prior predicts black and white, whose outputs have no gradient."""
    plain = images(6)
    opposite = torch.where(plain < 128, 1.0, -1.0)
    errors = []
    for logits in (None, logits_of):
        attack = sampler(plain, opposite, guidance=0.3)
        attack.access = dataclasses.replace(attack.access, logits=logits)
        errors.append(float((attack.reconstruct(protect(plain)).float() - plain.float()).abs().mean()))
    by_outputs, by_logits = errors
    assert by_logits < by_outputs / 2, errors


@pytest.mark.parametrize("start", [1.3, -1.3])
def test_guidance_moves_predicted_values_outside_the_range(start: float) -> None:
    plain = torch.full((2, 3, 8, 8), 128, dtype=torch.uint8)
    attack = sampler(plain, torch.zeros(plain.shape), guidance=0.1)
    attack.access = dataclasses.replace(attack.access, logits=logits_of)
    estimate = attack._guide(torch.full(plain.shape, start), protect(plain))
    assert estimate.abs().max() < 0.9


def test_guidance_does_not_leave_the_range_where_the_observed_value_is_at_its_end() -> None:
    white = torch.full((2, 3, 8, 8), 255, dtype=torch.uint8)
    attack = sampler(white, torch.zeros(white.shape), guidance=0.1)
    attack.access = dataclasses.replace(attack.access, logits=logits_of)
    assert torch.equal(attack._guide(torch.full(white.shape, 1.3), protect(white)), torch.full(white.shape, 1.3))


@pytest.mark.parametrize(
    ("changes", "guidance", "threat"),
    [
        ({}, 0.1, Threat.T5),
        ({}, 0.0, Threat.T4),
        ({"gradients": None}, 0.1, Threat.T4),
        ({"gradients": None, "protect": None}, 0.1, Threat.T3),
    ],
)
def test_the_threat_level_is_that_of_the_knowledge_in_use(
    changes: dict[str, Any], guidance: float, threat: Threat
) -> None:
    plain = images(4)
    attack = build("flow_matching", knowledge(plain, pairs=(plain, plain), **changes), guidance=guidance)
    attack.prepare()
    assert ("guided by" in attack.note) == (threat == Threat.T5)
    assert threat_of(FlowMatching, attack.access) == threat


def test_the_matcher_is_selected_on_few_images() -> None:
    attack = build("flow_matching", knowledge(images(330)), **SMALL)
    validation = attack.validation_images()
    assert validation is not None
    gallery, protected = validation
    assert len(gallery) == 330
    assert torch.equal(protected, protect(gallery[:25]))


def test_the_estimate_is_the_sample_with_the_lowest_misfit(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = images(4)
    attack = sampler(plain, plain.float())
    samples = [plain.roll(1, 0), plain, 255 - plain]
    monkeypatch.setattr(attack, "_sample", lambda *_: samples.pop(0))
    assert torch.equal(attack.reconstruct(protect(plain)), plain)


def test_samples_with_equal_saturated_outputs_are_compared_by_their_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Black and dark gray both become 0 where 255 is observed; dark gray is nearer."""
    white = torch.full((4, 3, 8, 8), 255, dtype=torch.uint8)
    samples = [torch.full_like(white, value) for value in (0, 60, 0)]
    assert torch.equal(protect(samples[0]), protect(samples[1]))
    attack = build("flow_matching", knowledge(white, logits=logits_of), **SMALL)
    assert isinstance(attack, FlowMatching)
    attack._network = ExactVelocity(white)  # type: ignore[assignment]
    monkeypatch.setattr(attack, "_sample", lambda *_: samples.pop(0))
    assert (attack.reconstruct(protect(white)) == 60).all()


def test_without_an_oracle_the_estimate_is_the_sample_nearest_to_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = images(4)
    attack = build("flow_matching", knowledge(plain, protect=None, gradients=None, pairs=(plain, plain)), **SMALL)
    assert isinstance(attack, FlowMatching)
    attack._network = ExactVelocity(plain)  # type: ignore[assignment]
    attack.prepare()
    assert "least distance from their mean" in attack.note
    samples = [torch.full_like(plain, value) for value in (0, 100, 255)]
    monkeypatch.setattr(attack, "_sample", lambda *_: samples.pop(0))
    assert (attack.reconstruct(plain) == 100).all()


@pytest.mark.slow
def test_a_trained_sampler_reconstructs_and_comes_back_from_its_weights(tmp_path: Path) -> None:
    plain = images(330)
    train = {"epochs": 6, "batch_size": 20, "optimizer": {"lr": 0.02}}
    options = SMALL | {"width": 8, "train": train, "guidance": 0.0}
    attack = build("flow_matching", knowledge(plain[:300]), **options)
    assert isinstance(attack, FlowMatching)
    reporter = Reporter(Storage(tmp_path), ProgressDisplay(quiet=True), torch.device("cpu"))
    outcome = Trainer(attack.task(), reporter).train()
    assert outcome.history[-1]["val_loss"] < 0.7 * outcome.history[0]["val_loss"]
    state = attack.state(outcome.trainee)
    attack.load(state)
    assert attack.max_queries == 200
    estimates = attack.reconstruct(protect(plain[300:]))
    error = (estimates.float() - plain[300:].float()).square().mean()
    mean_error = (plain[:300].float().mean(0) - plain[300:].float()).square().mean()
    assert error < mean_error
    other = build("flow_matching", knowledge(plain[:300]), **options)
    assert isinstance(other, FlowMatching)
    other.load(state)
    assert torch.equal(other.reconstruct(protect(plain[300:])), estimates)


@pytest.mark.parametrize("protected", [(3, 8, 8), (6, 8, 8), (1, 12, 12), (3, 4, 5), (3, 32, 32)])
def test_velocities_have_the_shape_of_plain_images(protected: tuple[int, int, int]) -> None:
    access = AttackerKnowledge((3, 8, 9), pairs=(torch.zeros(0), torch.zeros(0)))
    attack = build("flow_matching", access, width=4, depth=2)
    assert isinstance(attack, FlowMatching)
    network = attack.network(protected)
    planes = network.inputs(torch.rand(2, *protected))
    assert network(torch.randn(2, 3, 8, 9), torch.rand(2), planes).shape == (2, 3, 8, 9)
