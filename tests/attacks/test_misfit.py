"""The misfit of white-box attacks, and the check of a module's method ``logits``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo  # the first optimizer imports it, for seconds
from methods import build
from torch import Tensor, nn

from raypp.attacks.base import AttackerKnowledge
from raypp.attacks.misfit import checked_logits, interval_misfit
from raypp.attacks.statements import logits_of

SHAPE = (3, 8, 8)


class Module(nn.Module):
    """The sigmoid of contrast."""

    def logits(self, images: Tensor) -> Tensor:
        return 6 * (images - 0.5)

    def forward(self, images: Tensor) -> Tensor:
        return torch.sigmoid(Module.logits(self, images))


class OfLabels(Module):
    def logits(self, images: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        return images[:, 0, 0, labels]


class OfClasses(Module):
    def logits(self, images: Tensor) -> Tensor:
        return images.mean(dim=(1, 2, 3))


class Nothing(Module):
    def logits(self, images: Tensor) -> Any:
        return None


class Integers(Module):
    def logits(self, images: Tensor) -> Tensor:
        return super().logits(images).round().long()


class NoGradient(Module):
    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        return super().logits(images)


class Failing(Module):
    def logits(self, images: Tensor) -> Tensor:
        raise ValueError("no labels")


class Double(Module):
    def logits(self, images: Tensor) -> Tensor:
        return super().logits(images.double())


def knowledge(protection: nn.Module) -> AttackerKnowledge:
    images = torch.randint(0, 256, (40, *SHAPE), dtype=torch.uint8)

    @torch.no_grad()
    def protect(plain: Tensor) -> Tensor:
        outputs: Tensor = protection(plain.float() / 255)
        return (outputs * 255).round().to(torch.uint8)

    return AttackerKnowledge(SHAPE, images=images, protect=protect, gradients=protection, logits=logits_of(protection))


@pytest.mark.parametrize("kind", [Module, Double])
def test_logits_whose_sigmoid_is_the_output_are_used(kind: type[Module]) -> None:
    access = knowledge(kind())
    assert checked_logits(access, 0) is access.logits


@pytest.mark.parametrize("kind", [OfLabels, OfClasses, Nothing, Integers, NoGradient, Failing])
def test_a_method_of_the_same_name_is_no_statement_and_attacks_use_outputs(kind: type[Module]) -> None:
    access = knowledge(kind())
    assert access.logits is not None
    assert access.protect is not None
    assert access.images is not None
    assert checked_logits(access, 0) is None
    protected = access.protect(access.images[:2])
    white_box = build("white_box", access, steps=2, restarts=0)
    white_box.prepare()
    assert white_box.note == "2 steps on outputs from each of gray"
    assert white_box.reconstruct(protected).shape == (2, *SHAPE)
    flow: Any = build("flow_matching", access, width=4, depth=1, samples=1, steps=1)
    flow._network = flow.network(SHAPE).eval().requires_grad_(False)
    assert flow.reconstruct(protected).shape == (2, *SHAPE)


def test_the_misfit_is_zero_for_equal_bytes_only_and_has_a_gradient_where_values_saturate() -> None:
    def logits(plain: Tensor) -> Tensor:
        return 40 * (plain - 0.5)

    plain = torch.rand(5, *SHAPE, generator=torch.Generator().manual_seed(0))
    observed = (torch.sigmoid(logits(plain)) * 255).round().to(torch.uint8)
    assert interval_misfit(logits(plain), observed).max() < 1e-4
    wrong = (1 - plain).requires_grad_()
    misfit = interval_misfit(logits(wrong), observed)
    assert misfit.min() > 1
    misfit.sum().backward()
    assert wrong.grad is not None
    assert (wrong.grad != 0).float().mean() > 0.9
