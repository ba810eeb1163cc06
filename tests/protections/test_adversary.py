"""Adversaries in training: whom they reward, how the pool changes, and that a resumed training repeats it."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from conftest import Tiny
from networks import same
from rich.console import Console
from torch import Tensor, nn

from raypp.protections.adversary import AdversaryOptions, ContrastiveAdversary, InversePool, embedding_network
from raypp.protections.learned import AdversariesAndGuides, Learned
from raypp.training.protection_task import fit
from raypp.training.reporter import Reporter
from raypp.utils.errors import TrainingInterrupted
from raypp.utils.progress import ProgressDisplay
from raypp.utils.storage import Storage

SIZE = (8, 8)
SMALL = {"width": 4, "depth": 1}


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """The first step of an optimizer imports this module, which takes seconds."""
    import torch._dynamo  # noqa: F401


def pool(**options: float) -> InversePool:
    return InversePool(AdversaryOptions.model_validate(SMALL | options), 3, SIZE)


def auxiliary(protection: Learned) -> AdversariesAndGuides:
    networks = protection.build_auxiliary_networks(10, SIZE)
    assert isinstance(networks, AdversariesAndGuides)
    return networks


def learned(**options: float) -> Learned:
    return Learned(Learned.Options.model_validate({"width": 4, "depth": 1, "adversary": SMALL | options}))


def input_gradient(adversary: nn.Module, plain: Tensor, protected: Tensor) -> Tensor:
    leaf = protected.clone().requires_grad_()
    adversary(plain, leaf).backward()
    assert leaf.grad is not None
    return leaf.grad


def test_adversaries_lower_what_the_protection_raises() -> None:
    def gradients(**options: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Of the adversaries and of the protection."""
        torch.manual_seed(0)
        protection = learned(contrastive=0.1, **options)
        adversaries = auxiliary(protection)
        plain = torch.rand(4, 3, *SIZE)
        adversaries(plain, protection(plain), None, torch.zeros(4, dtype=torch.int64)).backward()
        return tuple({n: p.grad for n, p in net.named_parameters()} for net in (adversaries, protection))  # type: ignore

    attackers, protector = gradients(weight=1.0, clip=100.0)
    same_attackers, heavier = gradients(weight=3.0, clip=100.0)
    assert {name.split(".")[0] for name in attackers} == {"inverse_pool", "contrastive"}
    for name, gradient in attackers.items():
        torch.testing.assert_close(gradient, same_attackers[name])
        assert gradient.abs().sum() > 0 or "bias" in name
    _, contrastive_only = gradients(weight=1.0, clip=1e-6)
    for name in (name for name in protector if "weight" in name):
        by_pool = protector[name] - contrastive_only[name]
        torch.testing.assert_close(heavier[name] - contrastive_only[name], 3 * by_pool, rtol=1e-3, atol=1e-6)
        assert by_pool.abs().sum() > 0


def test_a_step_of_the_protection_raises_the_error_of_the_inverse_networks() -> None:
    protection = learned(clip=10.0, pool=1)
    adversaries = auxiliary(protection)
    plain, labels = torch.rand(8, 3, *SIZE), torch.zeros(8, dtype=torch.int64)
    before = adversaries(plain, protection(plain), None, labels)
    before.backward()
    with torch.no_grad():
        for parameter in protection.parameters():
            parameter -= 1e-3 * parameter.grad
    assert adversaries(plain, protection(plain), None, labels) > before


def test_an_image_counts_only_below_its_own_baseline_error() -> None:
    """The error of flat gray images is small, but larger than that of the mean image, which needs no attack."""
    flat = torch.full((12, 3, *SIZE), 0.45)
    plain = torch.cat((flat, torch.rand(4, 3, *SIZE).round()))
    adversary = pool(pool=1, clip=1.5)
    with torch.no_grad():
        errors = (torch.sigmoid(adversary.networks[0](plain)) - plain).square().mean(dim=(1, 2, 3))
        baseline = (plain - plain.mean(dim=0)).square().mean(dim=(1, 2, 3))
    assert (errors[:12] < 0.06).all(), "below the former limit for all images"
    assert (errors[:12] > 1.5 * baseline[:12]).all()
    assert (errors[12:] < 1.5 * baseline[12:]).all()
    sums = input_gradient(adversary, plain, plain).abs().sum(dim=(1, 2, 3))
    assert (sums[:12] == 0).all()
    assert (sums[12:] > 0).all()


def test_the_protection_gets_the_gradient_of_the_best_network_for_each_image() -> None:
    adversary = pool(weight=7.0, clip=100.0)
    adversary.networks.eval()  # batch normalization would mix the images' gradients
    plain, protected = torch.rand(6, 3, *SIZE), (torch.rand(6, 3, *SIZE) * 255).round() / 255
    leaf = protected.clone().requires_grad_()
    estimates = torch.stack([torch.sigmoid(network(leaf)) for network in adversary.networks])
    smallest = (estimates - plain).square().mean(dim=(2, 3, 4)).min(dim=0).values
    (expected,) = torch.autograd.grad(-7.0 * smallest.mean(), leaf)
    torch.testing.assert_close(input_gradient(adversary, plain, protected), expected)


def test_the_mean_image_is_that_of_all_training_images() -> None:
    adversary, plain = pool(pool=1), torch.rand(9, 3, *SIZE)
    for part in (plain[:2], plain[2:7], plain[7:]):
        adversary(part, part.clone().requires_grad_())
    torch.testing.assert_close(adversary.mean_image, plain.mean(dim=0))


def test_networks_of_the_pool_are_initialized_again_in_turn() -> None:
    def changes(adversary: InversePool) -> list[int]:
        """Indices of networks that change in each of eight steps, and -1 for none."""
        indices = []
        for _ in range(8):
            before = [[p.detach().clone() for p in network.parameters()] for network in adversary.networks]
            returned = adversary.reinitialize()
            changed = [
                i for i, network in enumerate(adversary.networks) if not same(before[i], [*network.parameters()])
            ]
            assert [id(p) for p in returned] == [id(p) for i in changed for p in adversary.networks[i].parameters()]
            indices.append(*changed or [-1])
        return indices

    adversary, other = pool(refresh_steps=2), pool(refresh_steps=2)
    other.seed = adversary.seed
    assert changes(adversary) == [-1, 0, -1, 1, -1, 2, -1, 0]
    torch.rand(1)  # another worker is elsewhere in its random numbers
    resumed = pool(refresh_steps=2)
    resumed.seed = adversary.seed
    resumed.load_state_dict(adversary.state_dict())
    assert changes(resumed) == [-1, 1, -1, 2, -1, 0, -1, 1]
    changes(other)
    assert same([*other.networks[1].parameters()], [*adversary.networks[1].parameters()])
    assert changes(pool(refresh_steps=0)) == [-1] * 8


def test_the_default_pool_is_refreshed_and_limited_by_the_baseline_error() -> None:
    adversary = pool()
    assert len(adversary.networks) == 3
    assert any(adversary.reinitialize() for _ in range(1000))
    assert adversary.options.clip == 1


@pytest.mark.parametrize(("index", "lr"), [(0, 0.02), (1, 0.02), (2, 0.002)])
def test_every_network_of_the_pool_learns_to_invert(index: int, lr: float) -> None:
    adversary = pool()
    shades = torch.rand(32, 3, 1, 1).expand(-1, -1, *SIZE)
    optimizer = torch.optim.Adam(adversary.networks[index].parameters(), lr)
    for _ in range(60):
        optimizer.zero_grad()
        loss = (torch.sigmoid(adversary.networks[index](1 - shades)) - shades).square().mean()
        loss.backward()
        optimizer.step()
    assert loss < 0.5 * (shades - shades.mean(dim=0)).square().mean()


def test_the_contrastive_adversary_learns_pairs_until_chance() -> None:
    plain = torch.rand(8, 3, *SIZE)
    adversary = ContrastiveAdversary(2.0, 3, SIZE)
    optimizer = torch.optim.Adam(adversary.parameters(), 0.003)
    for _ in range(20):
        optimizer.zero_grad()
        loss = adversary(plain, (1 - plain).requires_grad_())
        loss.backward()
        optimizer.step()
    assert loss < 0.5 * math.log(8)
    leaf = (1 - plain).requires_grad_()
    first = adversary(plain, leaf)
    first.backward()
    assert leaf.grad is not None
    moved = (leaf - 0.05 * leaf.grad.sign()).detach().requires_grad_()
    assert adversary(plain, moved) > first, "the protection's step makes matching harder"
    alike = torch.full_like(plain, 0.5)  # nothing to match: log N for every image
    assert input_gradient(adversary, plain, alike).abs().sum() == 0


def test_the_embedding_fits_any_size() -> None:
    for size in ((8, 8), (17, 40), (3, 2)):
        assert embedding_network(1, size)(torch.rand(2, 1, *size)).shape == (2, 64)


@pytest.mark.slow
def test_training_against_adversaries_resumes_to_the_same_result(tiny: Tiny, tmp_path: Path) -> None:
    adversary = "{width: 2, depth: 1, refresh_steps: 2, contrastive: 0.1}"
    config = tiny(train__alpha=0, train__epochs=3, train__optimizer__name="adamw", protection__adversary=adversary)

    class Stopping(Reporter):
        def __init__(self, folder: Path, at: int) -> None:
            display = ProgressDisplay(Console(quiet=True))
            super().__init__(Storage(folder), display, torch.device("cpu"))
            self.calls = itertools.count()
            self.at = at

        def should_stop(self) -> bool:
            return next(self.calls) == self.at

    whole = fit(config, Stopping(tmp_path / "whole", -1))
    with pytest.raises(TrainingInterrupted):
        fit(config, Stopping(tmp_path / "parts", 2))
    resumed = fit(config, Stopping(tmp_path / "parts", -1))
    assert len(resumed.history) == 3
    assert same(resumed.system.state_dict(), whole.system.state_dict())
    steps = [k for k in whole.system.state_dict() if k.endswith("_extra_state")]
    assert [int(whole.system.state_dict()[k]) for k in steps] == [whole.best["step"]]
