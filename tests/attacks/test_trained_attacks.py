"""Attacks that train a network, and the white box: they break invertible protections and no others."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_flags
from torch import Tensor, nn

from raypp.attacks import ATTACKS
from raypp.attacks.base import Attack, AttackerKnowledge, AttackError, ImageMap
from raypp.attacks.trained import TrainedAttack
from raypp.config.presets import load_config
from raypp.data import SOURCES
from raypp.evaluation.scorecard import BROKEN_RATE
from raypp.experiments.training_run import open_run
from raypp.metrics.retrieval import reidentify
from raypp.protections import PROTECTIONS
from raypp.training.checkpoint import EpochMetrics
from raypp.training.optim import learning_rate
from raypp.training.protection_task import fit
from raypp.training.reporter import Reporter
from raypp.training.trainer import Trainer
from raypp.utils.keys import Key
from raypp.utils.progress import ProgressDisplay
from raypp.utils.storage import Storage

Pictures = tuple[Tensor, Tensor]
KNOWN = 600
SMALL = {"width": 8, "depth": 2}


@pytest.fixture(scope="module")
def pictures() -> Pictures:
    """Shapes of 16 x 16 and their classes: 600 of the attacker's, 200 of others."""
    options = SOURCES.options("shapes").model_validate({"name": "shapes", "num_train": KNOWN + 200, "num_test": 10})
    dataset = SOURCES.build(options, size=(16, 16), channels=3).load("train")
    return torch.from_numpy(dataset.images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(dataset.labels)


def knowledge(pictures: Pictures, protect: ImageMap, structure: str = "none") -> AttackerKnowledge:
    images, labels = pictures
    half = KNOWN // 2
    return AttackerKnowledge(
        shape=(3, 16, 16),
        structure=structure,
        images=images[:KNOWN],
        labels=labels[:KNOWN],
        num_classes=10,
        ciphertexts=lambda: (images[:half], labels[:half], protect(images[half:KNOWN]), labels[half:KNOWN]),
        protect=protect,
        fresh=lambda number: lambda plain: protect(plain),
        classify=lambda protected: torch.zeros(len(protected), dtype=torch.int64),
    )


def build(name: str, access: AttackerKnowledge, **options: Any) -> Any:
    return ATTACKS.build(ATTACKS.options(name).model_validate({"name": name, **options}), access)


def train(attack: TrainedAttack, folder: Path, share: float = 1.0, num: int | None = None) -> list[EpochMetrics]:
    done = Trainer(
        attack.task(share, num), Reporter(Storage(folder), ProgressDisplay(quiet=True), torch.device("cpu"))
    ).train()
    attack.load(attack.state(done.trainee))
    attack.prepare()
    return done.history


def reidentification_rate(attack: Attack, pictures: Pictures, protect: ImageMap, num: int = 200) -> float:
    """Of ``num`` originals outside the attacker's images, among themselves."""
    others = pictures[0][KNOWN : KNOWN + num]
    estimates = attack.reconstruct(protect(others))
    assert estimates.shape == others.shape
    assert estimates.dtype == torch.uint8
    none = torch.zeros(len(others), dtype=torch.int64)
    return float(
        reidentify(estimates.float() / 255, others.float() / 255, torch.arange(len(others)), none).top(1).mean()
    )


def identity(images: Tensor) -> Tensor:
    return images


def hashed(images: Tensor) -> Tensor:
    """Noise that a key and the image determine: it reveals the least of all deterministic protections."""
    rows = [
        np.frombuffer(hashlib.shake_256(b"key" + image.numpy().tobytes()).digest(image.numel()), dtype=np.uint8)
        for image in images
    ]
    return torch.from_numpy(np.stack(rows)).view(images.shape)


INVERSES: dict[str, dict[str, Any]] = {
    "inverse": SMALL | {"train": {"epochs": 4, "batch_size": 20, "optimizer": {"lr": 0.02}}},
    "itn": SMALL | {"train": {"epochs": 6, "batch_size": 32, "schedule": {"milestones": [5]}}},
    "inverse_own_keys": SMALL | {"train": {"epochs": 4, "batch_size": 20, "optimizer": {"lr": 0.02}}},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", INVERSES)
def test_an_inverse_network_breaks_the_identity_and_not_a_hash(name: str, pictures: Pictures, tmp_path: Path) -> None:
    attack = build(name, knowledge(pictures, identity), **INVERSES[name])
    history = train(attack, tmp_path / "identity")
    assert history[-1]["val_loss"] < history[0]["val_loss"]
    assert reidentification_rate(attack, pictures, identity) > 0.5  # chance is 0.5%
    short = INVERSES[name] | {"train": INVERSES[name]["train"] | {"epochs": 1}}
    attack = build(name, knowledge(pictures, hashed), **short)
    train(attack, tmp_path / "hash")
    assert reidentification_rate(attack, pictures, hashed) < 0.05


@pytest.mark.parametrize("name", [*INVERSES, "white_box"])
def test_a_matcher_is_validated_on_images_outside_the_training(name: str, pictures: Pictures) -> None:
    def invert(images: Tensor) -> Tensor:
        return 255 - images

    access = dataclasses.replace(knowledge(pictures, invert), gradients=lambda images: 1 - images)
    gallery, protected = build(name, access).validation_images()
    plain = gallery[: len(protected)]
    assert torch.equal(protected, 255 - plain)
    assert len(protected) == (25 if name == "white_box" else KNOWN // 10)
    assert len(gallery.unique(dim=0)) == len(access.images.unique(dim=0))
    trained_on = build("inverse", access).task().images
    assert not (plain[:, None] == trained_on[None]).flatten(2).all(2).any()


@pytest.mark.slow
def test_alpha_zero_breaks(pictures: Pictures, tmp_path: Path) -> None:
    """Images protected without a feature distance stay invertible."""
    flags = tiny_flags(
        tmp_path, train__alpha=0, train__epochs=2, train__optimizer__lr=0.02, data__source__num_train=400
    )
    with open_run(load_config("quickstart", flags=flags), "visible") as run:
        protection = fit(
            run.config, Reporter(run.storage, ProgressDisplay(quiet=True), torch.device("cpu"))
        ).system.protection
    attack = build("inverse", knowledge(pictures, protection.protect), **INVERSES["inverse"])
    train(attack, tmp_path / "attack")
    assert reidentification_rate(attack, pictures, protection.protect) > BROKEN_RATE


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tanaka", "pixel"])
def test_own_keys_teach_nothing_about_anothers(name: str, pictures: Pictures, tmp_path: Path) -> None:
    """Under the victim's key, an attacker with the algorithm alone is near chance."""
    options = PROTECTIONS.options(name).model_validate({"name": name})

    def under(key: Key) -> ImageMap:
        protect: ImageMap = PROTECTIONS.build(options, channels=3, key=key).protect
        return protect

    access = knowledge(pictures, under(Key(bytes(32))))
    own = {"fresh": lambda number: under(Key(hashlib.sha256(str(number).encode()).digest()))}
    attack = build("inverse_own_keys", AttackerKnowledge(**{**vars(access), **own}), **SMALL, train={"epochs": 3})
    train(attack, tmp_path)
    assert reidentification_rate(attack, pictures, under(Key(bytes(32)))) < 0.3


@pytest.mark.slow
@pytest.mark.parametrize(("style", "structure"), [("dcgan", "none"), ("dcgan", "pixel"), ("dcgan", "block"),
                                                  ("sia", "none"), ("sia", "shuffled_block")])  # fmt: skip
def test_every_form_of_the_unpaired_gan_trains(style: str, structure: str, pictures: Pictures, tmp_path: Path) -> None:
    few = pictures[0][:64], pictures[1][:64]
    access = AttackerKnowledge(
        shape=(3, 16, 16), structure=structure, num_classes=10,
        ciphertexts=lambda: (few[0][:32], few[1][:32], 255 - few[0][32:], few[1][32:]),
    )  # fmt: skip
    attack = build("unpaired_gan", access, style=style, width=4, train={"epochs": 1, "batch_size": 16})
    (row,) = train(attack, tmp_path)
    assert np.isfinite([row["train_loss"], row["train_critic"]]).all()
    assert attack.reconstruct(few[0]).shape == few[0].shape


@pytest.mark.slow
def test_the_unpaired_gan_learns_what_natural_images_look_like(pictures: Pictures, tmp_path: Path) -> None:
    """Darkened images become as bright as the attacker's own; from a hash it draws nothing that finds an original."""
    plain = pictures[0][:KNOWN].float().mean()

    def dark(images: Tensor) -> Tensor:
        return images // 4

    settings = {"generator": "pixelwise", "train": {"epochs": 6, "batch_size": 20, "optimizer": {"lr": 0.002}}}
    attack = build("unpaired_gan", knowledge(pictures, dark), **settings)
    train(attack, tmp_path / "dark")
    mean = attack.reconstruct(dark(pictures[0][KNOWN:])).float().mean()
    assert abs(mean - plain) < 0.5 * abs(plain / 4 - plain)
    attack = build("unpaired_gan", knowledge(pictures, hashed), width=4, train={"epochs": 1})
    train(attack, tmp_path / "hash")
    assert reidentification_rate(attack, pictures, hashed) < 0.05


def test_small_images_are_too_small_for_a_gan() -> None:
    images = torch.zeros(4, 3, 12, 12, dtype=torch.uint8)
    none = torch.zeros(4, dtype=torch.int64)
    attack = build("unpaired_gan", AttackerKnowledge((3, 12, 12), ciphertexts=lambda: (images, none, images, none)))
    with pytest.raises(AttackError, match="needs images with sides of at least 16 pixels"):
        attack.task()


# The white box


def differentiable(strength: float) -> Callable[[Tensor], Tensor]:
    """A negative with more contrast, smooth in every pixel."""
    return lambda images: torch.sigmoid(strength * (0.5 - images))


@pytest.mark.slow
def test_the_white_box_inverts_what_is_differentiable(pictures: Pictures) -> None:
    forward = differentiable(4)

    def protect(images: Tensor) -> Tensor:
        return (forward(images.float() / 255) * 255).round().to(torch.uint8)

    access = AttackerKnowledge((3, 16, 16), gradients=forward)
    attack = build("white_box", access, steps=200, tv=0.0, restarts=1)
    attack.prepare()
    assert attack.note == "200 steps on outputs from each of gray, noise"
    assert attack.max_queries == 200
    assert reidentification_rate(attack, pictures, protect) > 0.95


def test_the_white_box_begins_where_the_inverse_network_ended(pictures: Pictures) -> None:
    """With one step it can do little but keep the start that the objective likes best."""
    others = pictures[0][KNOWN:]
    access = AttackerKnowledge((3, 16, 16), gradients=differentiable(4), earlier={"inverse": lambda protected: others})
    attack = build("white_box", access, steps=1, tv=0.0, lr=0.001, restarts=0, batch_size=200)
    attack.prepare()
    assert "the inverse network's estimate" in attack.note

    def protect(images: Tensor) -> Tensor:
        return (differentiable(4)(images.float() / 255) * 255).round().to(torch.uint8)

    assert reidentification_rate(attack, pictures, protect) > 0.95


class Saturated(nn.Module):
    """A mixture of all values with a bias that saturates most outputs, for gray images too."""

    def __init__(self, gain: float, bias: float) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.mixing = gain * torch.linalg.qr(torch.randn(768, 768, generator=generator)).Q
        self.bias = bias * torch.randn(768, generator=generator)

    def logits(self, images: Tensor) -> Tensor:
        return ((images - 0.5).flatten(1) @ self.mixing + self.bias).view(images.shape)

    def forward(self, images: Tensor) -> Tensor:
        return torch.sigmoid(self.logits(images))


def test_logits_invert_saturated_outputs(pictures: Pictures) -> None:
    protection = Saturated(gain=20, bias=8)

    def protect(images: Tensor) -> Tensor:
        return (protection(images.float() / 255) * 255).round().to(torch.uint8)

    rates = []
    for logits in (None, protection.logits):
        access = AttackerKnowledge((3, 16, 16), gradients=protection, logits=logits)
        attack = build("white_box", access, steps=40, restarts=0, batch_size=200)
        attack.prepare()
        assert f"40 steps on {'outputs' if logits is None else 'logits'}" in attack.note
        rates.append(reidentification_rate(attack, pictures, protect, num=50))
    by_outputs, by_logits = rates
    assert by_outputs < 0.3, rates
    assert by_logits > 0.45, rates


def test_logits_of_another_network_are_not_used() -> None:
    protection = Saturated(gain=20, bias=6)
    access = AttackerKnowledge((3, 16, 16), gradients=protection, logits=Saturated(gain=10, bias=6).logits)
    attack = build("white_box", access)
    attack.prepare()
    assert "steps on outputs" in attack.note


def test_a_gray_start_wins_over_a_wrong_estimate(pictures: Pictures) -> None:
    """The distance from the inverse network's estimate does not count in the choice of the start."""

    def protect(images: Tensor) -> Tensor:
        return (differentiable(4)(images.float() / 255) * 255).round().to(torch.uint8)

    black = torch.zeros_like(pictures[0][KNOWN:])
    access = AttackerKnowledge((3, 16, 16), gradients=differentiable(4), earlier={"inverse": lambda protected: black})
    attack = build("white_box", access, steps=60, tv=0.0, prior=1.0, restarts=0, batch_size=200)
    attack.prepare()
    assert reidentification_rate(attack, pictures, protect) > 0.9


def test_the_white_box_finds_nothing_where_gradients_say_nothing(pictures: Pictures) -> None:
    def flat(images: Tensor) -> Tensor:
        return 0 * images

    attack = build("white_box", AttackerKnowledge((3, 16, 16), gradients=flat), steps=5, restarts=1)
    attack.prepare()
    assert reidentification_rate(attack, pictures, hashed) < 0.05


# What trained attacks have in common


@pytest.mark.slow
def test_without_an_oracle_the_pairs_are_all_there_is(pictures: Pictures, tmp_path: Path) -> None:
    images, labels = pictures
    access = AttackerKnowledge(
        (3, 16, 16), images=images[:100], labels=labels[:100], pairs=(images[:100], 255 - images[:100])
    )
    attack = build("inverse", access, **SMALL, train={"epochs": 1})
    assert attack.num_images == 90
    train(attack, tmp_path)
    with pytest.raises(AttackError, match="attack inverse needs pairs of plain and protected images, which this tar"):
        build("inverse", AttackerKnowledge((3, 16, 16), images=images))


@pytest.mark.slow
def test_the_class_is_an_input_of_a_conditional_attack(pictures: Pictures, tmp_path: Path) -> None:
    batch_sizes: list[int] = []

    def classify(protected: Tensor) -> Tensor:
        batch_sizes.append(len(protected))
        return torch.zeros(len(protected), dtype=torch.int64)

    access = AttackerKnowledge(**{**vars(knowledge(pictures, hashed)), "classify": classify})
    attack = build("inverse_conditional", access, **SMALL, train={"epochs": 1})
    train(attack, tmp_path)
    assert reidentification_rate(attack, pictures, hashed) < 0.05
    assert batch_sizes == [200]


@pytest.mark.slow
@pytest.mark.parametrize("protected", [(3, 16, 16), (6, 16, 16), (1, 20, 20), (3, 8, 9), (3, 64, 64)])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("inverse", {}),
        ("inverse", {"patch": 1, "places": 0}),
        ("inverse", {"patch": 3}),
        ("inverse", {"standardize": False}),
        ("inverse_conditional", {}),
    ],
)
def test_an_inverse_network_comes_back_from_its_weights(
    protected: tuple[int, int, int], name: str, options: dict[str, Any]
) -> None:
    """Its weights alone suffice to build it, for every size of protected images and all options."""
    access = AttackerKnowledge(
        (3, 16, 17), pairs=(torch.zeros(0), torch.zeros(0)), num_classes=10,
        classify=lambda images: torch.arange(len(images)),
    )  # fmt: skip
    attack = build(name, access, width=2, **options)
    net = attack.network(protected).eval()
    images = torch.randint(0, 256, (5, *protected), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    net.inputs.fit_normalization(images)
    with torch.no_grad():
        expected = net(images.float() / 255, torch.arange(5) if name == "inverse_conditional" else None)
    assert expected.shape == (5, 3, 16, 17)
    other = build(name, access, width=2, **options)
    other.load(net.state_dict())
    assert torch.equal(other.reconstruct(images), (expected * 255).round().to(torch.uint8))


def test_saturated_values_are_spread_out(pictures: Pictures) -> None:
    """The logits of 254 and 255 are far apart; a constant position stays near zero."""
    attack = build("inverse", AttackerKnowledge((1, 16, 16), pairs=(torch.zeros(0), torch.zeros(0))), width=2)
    images = torch.full((100, 1, 16, 16), 255, dtype=torch.uint8)
    images[:50, :, :8] = 254
    net = attack.network((1, 16, 16)).inputs
    net.fit_normalization(images)
    value, logit = net.standardize(images.float() / 255).split(1, dim=1)
    assert torch.allclose(logit[:50, :, :8], torch.tensor(-1.0), atol=1e-4)
    assert torch.allclose(logit[50:, :, :8], torch.tensor(1.0), atol=1e-4)
    assert value[:, :, :8].abs().max() < 0.2
    assert value[:, :, 8:].abs().max() < 1e-4
    assert logit[:, :, 8:].abs().max() < 1e-4


@pytest.mark.parametrize("name", ["inverse", "unpaired_gan"])
def test_a_protection_that_is_random_is_resumed(name: str, pictures: Pictures) -> None:
    """With a key per image, no two runs get the same protected images, but the data counts as the same."""
    random = torch.Generator().manual_seed(0)

    def protect(images: Tensor) -> Tensor:
        return images ^ torch.randint(0, 256, images.shape, generator=random, dtype=torch.uint8)

    first, second = (build(name, knowledge(pictures, protect), width=4).task().fingerprint for _ in range(2))
    assert first == second


def test_the_average_of_weights_moves_faster_in_the_first_steps_and_continues_on_resume(pictures: Pictures) -> None:
    task = build("inverse", knowledge(pictures, identity), **SMALL, train={"epochs": 1}).task()
    trainee, resumed = (task.build(task.phases[0]) for _ in range(2))

    def average_after_step(system: Any, value: float) -> float:
        torch.nn.init.constant_(next(system.net.parameters()), value)
        system.on_after_optimizer_step()
        return float(next(system.final.parameters()).flatten()[0])

    assert average_after_step(trainee, 1.0) == 1
    assert average_after_step(trainee, 2.0) == pytest.approx(2 - 3 / 12)
    for value in (3.0, 4.0):
        average_after_step(trainee, value)
    resumed.load_trainable_state_dict(trainee.trainable_state_dict())
    assert average_after_step(resumed, 5.0) == average_after_step(trainee, 5.0) < 5 - 5 / 15


def test_part_of_the_images_takes_as_many_steps(pictures: Pictures) -> None:
    attack = build("inverse", knowledge(pictures, identity), **SMALL, train={"epochs": 4, "batch_size": 45})
    full, quarter, half = attack.task(), attack.task(1.0, 135), attack.task(0.5)
    assert (full.phases[0].epochs, full.batches.num_batches) == (4, 12)
    assert (quarter.phases[0].epochs, quarter.batches.num_batches) == (16, 3)
    assert half.phases[0].epochs == 2


@pytest.mark.parametrize("name", ["itn", "unpaired_gan"])
def test_milestones_keep_their_shares_of_a_shorter_training(pictures: Pictures, name: str) -> None:
    train = {"epochs": 40, "schedule": {"name": "multistep", "milestones": [20, 30], "gamma": 0.5}}
    sizes = SMALL if name == "itn" else {}
    task = build(name, knowledge(pictures, identity), **sizes, train=train).task(0.5)
    assert task.phases[0].epochs == 20
    rates = [learning_rate(task.train, 20, progress) / task.train.optimizer.lr for progress in (9.9, 10, 14.9, 15)]
    assert rates == pytest.approx([1, 0.5, 0.5, 0.25])


def test_an_attacks_milestones_move_with_its_epochs() -> None:
    options = ATTACKS.options("itn").model_validate({"name": "itn", "train": {"epochs": 20}})
    assert options.train.schedule.milestones == (6, 12, 16)


def test_a_worker_without_images_to_judge_by_counts_none(pictures: Pictures, monkeypatch: pytest.MonkeyPatch) -> None:
    access = dataclasses.replace(knowledge(pictures, identity), images=pictures[0][:20], labels=pictures[1][:20])
    task = build("inverse", access, **SMALL, train={"epochs": 1}).task()
    trainee = task.build(task.phases[0])
    alone = task.validate(trainee, 0, 1)
    shares: list[Tensor] = []

    def added(share: Tensor) -> Tensor:
        shares.append(share.clone())
        return torch.stack(shares).sum(0)

    monkeypatch.setattr("raypp.attacks.inverse.all_reduce_sum", added)
    for rank in range(3):  # for two images
        together = task.validate(trainee, rank, 3)
    assert not shares[2].any()
    assert together == pytest.approx(alone)


def test_workers_share_every_batch(pictures: Pictures) -> None:
    attack = build("inverse", knowledge(pictures, identity), **SMALL, train={"epochs": 1, "batch_size": 60})
    whole = attack.task()
    seen = []
    for rank in range(2):
        task = attack.task()
        task.share(rank, 2)
        seen.append([at for _, at in task.batches.epoch(0)])
    for one, first, second in zip((at for _, at in whole.batches.epoch(0)), *seen, strict=True):
        assert torch.equal(one, torch.cat((first, second)))


def test_the_papers_recipe_is_that_of_its_authors() -> None:
    options = ATTACKS.options("itn")(name="itn")
    assert (options.width, options.depth, options.loss, options.ssim_weight, options.ema) == (64, 4, "mse", 0, 0)
    assert options.fixed_pairs
    train = options.train
    assert (train.epochs, train.batch_size, train.optimizer.name, train.optimizer.lr) == (200, 128, "sgd", 0.1)
    assert (train.optimizer.momentum, train.optimizer.weight_decay) == (0.9, 5e-4)
    assert (train.schedule.milestones, train.schedule.gamma) == ((60, 120, 160), 0.2)
