"""Attacks that train encoders: the learned matcher and attribute inference, with their further scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # the first optimizer imports it, for seconds
from methods import build
from sklearn.metrics import r2_score, roc_auc_score
from torch import Tensor

from raypp.attacks import learned_matcher
from raypp.attacks.attribute_inference import _explained, thumbnails
from raypp.attacks.base import AttackerKnowledge, AttackError, ImageMap
from raypp.attacks.learned_matcher import _auc_contributions, _identified, _share_below
from raypp.attacks.trained import TrainedAttack
from raypp.attacks.variants import VARIANTS, random_variants
from raypp.data import SOURCES
from raypp.training.reporter import Reporter
from raypp.training.trainer import Trainer
from raypp.utils.progress import ProgressDisplay
from raypp.utils.storage import Storage

KNOWN, OTHERS = 500, 100
SHORT = {"width": 8, "train": {"batch_size": 50}}


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    """Shapes of 16 x 16: the attacker's, then others."""
    options = SOURCES.options("shapes").model_validate({"name": "shapes", "num_train": KNOWN + OTHERS, "num_test": 10})
    dataset = SOURCES.build(options, size=(16, 16), channels=3).load("train")
    return torch.from_numpy(dataset.images).permute(0, 3, 1, 2).contiguous()


def train(name: str, pictures: Tensor, protect: ImageMap, folder: Path, *, epochs: int) -> TrainedAttack:
    access = AttackerKnowledge((3, 16, 16), images=pictures[:KNOWN], protect=protect, gallery=pictures[KNOWN:])
    options = SHORT | {"train": SHORT["train"] | {"epochs": epochs}}  # type: ignore[operator]
    attack: Any = build(name, access, **options)
    reporter = Reporter(Storage(folder), ProgressDisplay(quiet=True), torch.device("cpu"))
    attack.load(attack.state(Trainer(attack.task(), reporter).train().trainee))
    attack.prepare()
    return attack  # type: ignore[no-any-return]


def means(attack: TrainedAttack, pictures: Tensor, protect: ImageMap) -> dict[str, float]:
    """Means of the extra scores on the other images."""
    others = pictures[KNOWN:]
    values = attack.measure(others, protect(others), torch.arange(OTHERS))
    assert values.keys() == attack.extra_scores.keys()
    assert all(value.shape == (OTHERS,) for value in values.values())
    return {name: float(value.double().mean()) for name, value in values.items()}


def noisy_negative(images: Tensor) -> Tensor:
    noise = 10 * torch.randn(images.shape)
    return (255 - images.float() + noise).round().clamp(0, 255).to(torch.uint8)


def four_grays(images: Tensor) -> Tensor:
    """One of four grays, by the mean of the image: two bits."""
    level = (images.float().mean(dim=(1, 2, 3)) / 20).floor() % 4 * 60
    return level.to(torch.uint8).view(-1, 1, 1, 1).expand(images.shape).contiguous()


@pytest.mark.slow
def test_a_learned_matcher_identifies_variants_under_a_random_protection(pictures: Tensor, tmp_path: Path) -> None:
    attack = train("learned_matcher", pictures, noisy_negative, tmp_path, epochs=4)
    scores = means(attack, pictures, noisy_negative)
    others = pictures[KNOWN:]
    identified = (attack.reconstruct(noisy_negative(others)) == others).flatten(1).all(1).float().mean()
    assert identified > 0.6
    for name in VARIANTS:  # chance is 1%
        assert scores[f"reidentified_{name}"] > 0.5
        assert scores[f"linkage_auc_{name}"] > 0.95
    assert 3 < scores["mutual_information_bits"] <= 6.65


@pytest.mark.slow
def test_the_bound_on_information_is_below_the_information(pictures: Tensor, tmp_path: Path) -> None:
    attack = train("learned_matcher", pictures, four_grays, tmp_path, epochs=5)
    groups = four_grays(pictures[KNOWN:])[:, 0, 0, 0].unique(return_counts=True)[1] / OTHERS
    entropy = -float((groups * groups.log2()).sum())
    assert 0.8 < means(attack, pictures, four_grays)["mutual_information_bits"] < entropy + 0.1


def test_a_learned_matcher_needs_a_gallery(pictures: Tensor, tmp_path: Path) -> None:
    access = AttackerKnowledge((3, 16, 16), images=pictures[:KNOWN], protect=noisy_negative)
    with pytest.raises(AttackError, match="needs a gallery of plain images"):
        build("learned_matcher", access)


def test_attributes_of_a_negative_are_inferred(pictures: Tensor, tmp_path: Path) -> None:
    attack = train("attribute_inference", pictures, noisy_negative, tmp_path, epochs=4)
    scores = means(attack, pictures, noisy_negative)
    assert scores["r2_mean_color"] > 0.7
    assert scores["r2_thumbnail"] > 0.5
    estimates = attack.reconstruct(noisy_negative(pictures[KNOWN:]))
    assert estimates.shape == (OTHERS, 3, 16, 16)
    errors = (thumbnails(estimates.float()) - thumbnails(pictures[KNOWN:].float())).abs().mean()
    assert errors < 30


def test_attributes_of_a_constant_image_are_not_inferred(pictures: Tensor, tmp_path: Path) -> None:
    attack = train("attribute_inference", pictures, torch.zeros_like, tmp_path, epochs=2)
    assert abs(means(attack, pictures, torch.zeros_like)["r2_mean_color"]) < 0.1


@pytest.mark.parametrize("name", ["learned_matcher", "attribute_inference"])
def test_encoders_come_back_from_their_weights(name: str, pictures: Tensor, tmp_path: Path) -> None:
    attack: Any = train(name, pictures, noisy_negative, tmp_path, epochs=1)
    other: Any = build(name, attack.access, **SHORT)
    other.load(attack._module.state_dict())
    protected = noisy_negative(pictures[:20])
    assert torch.equal(other.reconstruct(protected), attack.reconstruct(protected))


@pytest.mark.parametrize("name", ["learned_matcher", "attribute_inference"])
def test_validation_averages_over_all_images(name: str) -> None:
    images = torch.randint(0, 256, (3000, 3, 11, 12), dtype=torch.uint8)
    access = AttackerKnowledge((3, 11, 12), images=images, protect=lambda x: 255 - x, gallery=images[:20])
    attack: Any = build(name, access, width=2)
    task = attack.task()
    module = task.build(task.phases[0]).eval()
    metrics = task.validate(module, 0, 1)
    with torch.no_grad():
        expected = module.scores(*task.val, slice(None))
    assert len(expected["loss"]) == 300
    assert metrics == {f"val_{key}": pytest.approx(float(value.double().mean())) for key, value in expected.items()}


def test_the_matcher_of_inferred_thumbnails_is_selected_on_the_validation_images(pictures: Tensor) -> None:
    access = AttackerKnowledge((3, 16, 16), images=pictures[:KNOWN], protect=lambda x: 255 - x)
    attack: Any = build("attribute_inference", access, **SHORT)
    gallery, protected = attack.validation_images()
    plain, expected = attack.task().val
    assert len(gallery) == KNOWN
    assert torch.equal(gallery[: len(plain)], plain)
    assert torch.equal(protected, expected)


def test_auc_and_explained_variance_are_those_of_scikit_learn() -> None:
    random = torch.Generator().manual_seed(0)
    first, second = torch.randint(-2, 3, (2, 30, 4), generator=random).float()  # with ties
    second += first
    auc = roc_auc_score(torch.eye(30).flatten(), (first @ second.t()).flatten())
    assert float(_auc_contributions(first, second, 0).double().mean()) == pytest.approx(auc, abs=1e-6)
    actual, predicted = torch.randn(50, 3, generator=random), torch.randn(50, 3, generator=random)
    actual *= torch.tensor([1.0, 2.0, 5.0])
    r2 = r2_score(actual, predicted, multioutput="variance_weighted")
    assert float(_explained(actual, predicted).mean()) == pytest.approx(r2, abs=1e-5)


def test_the_auc_of_many_images_is_that_of_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """All pairs of 10,000 images need gigabytes."""
    random = torch.Generator().manual_seed(0)
    first = torch.nn.functional.normalize(torch.randn(120, 8, generator=random))
    second = torch.nn.functional.normalize(first + 0.6 * torch.randn(120, 8, generator=random))
    exact = _auc_contributions(first, second, 0)
    monkeypatch.setattr(learned_matcher, "MAX_OTHERS", 10_000)
    sampled = _auc_contributions(first, second, 0)
    assert not torch.equal(exact, sampled)
    assert float(sampled.mean()) == pytest.approx(float(exact.mean()), abs=0.01)
    assert float(sampled.std()) == pytest.approx(float(exact.std()), rel=0.1)
    assert _auc_contributions(first[:1], second[:1], 0).isnan().all()


def test_the_interval_of_the_auc_varies_with_both_classes() -> None:
    """Here a third of the images is alike, so a few images decide most of the comparisons."""
    random = torch.Generator().manual_seed(0)
    num, areas, errors, of_pairs = 60, [], [], []
    for _ in range(150):
        plain, alike = torch.randn(num, 8, generator=random), torch.rand(num, 1, generator=random) < 0.3
        noise = 0.5 * torch.randn(2, num, 8, generator=random)
        uploads = torch.where(alike, torch.eye(8)[0] + 0.1 * plain + 0.2 * noise, plain + noise)
        first, second = torch.nn.functional.normalize(uploads, dim=2)
        values = _auc_contributions(first, second, 0)
        areas.append(values.mean())
        errors.append(values.std() / num**0.5)
        others = (first @ second.t())[~torch.eye(num, dtype=torch.bool)]
        of_pairs.append(_share_below(others, (first * second).sum(1)).std() / num**0.5)
    deviation = float(torch.stack(areas).std())
    assert float(torch.stack(errors).mean()) == pytest.approx(deviation, rel=0.15)
    assert float(torch.stack(of_pairs).mean()) < 0.7 * deviation, "the pairs alone vary less"


def test_equal_scores_identify_nothing_but_copies_do() -> None:
    gallery = torch.randint(0, 256, (3, 3, 12, 12), dtype=torch.uint8)
    assert _identified([torch.ones(1, 3), torch.ones(1, 3)], torch.tensor([0, 1]), gallery).tolist() == [0, 0]
    assert _identified([torch.tensor([[0.1, 0.5, 0.5]])], torch.tensor([2]), gallery).tolist() == [0]
    gallery[1] = gallery[2]
    assert _identified([torch.tensor([[0.1, 0.5, 0.5]])], torch.tensor([2]), gallery).tolist() == [1]


def test_a_learned_matcher_ranks_the_whole_gallery(pictures: Tensor) -> None:
    access = AttackerKnowledge((3, 16, 16), images=pictures[:KNOWN], protect=lambda x: x, gallery=pictures[KNOWN:])
    attack: Any = build("learned_matcher", access, **SHORT)
    module = attack.task().build(attack.task().phases[0])
    attack.load(module.state_dict())
    uploads = pictures[KNOWN : KNOWN + 40]
    scores = attack.candidate_scores(uploads)
    assert scores.shape == (40, OTHERS)
    assert torch.equal(attack.reconstruct(uploads), pictures[KNOWN:][scores.argmax(1)])


@pytest.mark.parametrize("actual", [torch.full((50, 3), 0.3), 0.3 + 0.5 / 255 * torch.eye(2).repeat(25, 1)])
def test_the_explained_variance_of_attributes_without_variance_is_zero(actual: Tensor) -> None:
    assert torch.equal(_explained(actual, actual + 0.1), torch.zeros(50))


def test_equal_images_have_no_attributes_to_infer(pictures: Tensor) -> None:
    access = AttackerKnowledge((3, 16, 16), images=pictures[:KNOWN], protect=lambda x: 255 - x)
    attack: Any = build("attribute_inference", access, **SHORT)
    attack.load(attack.build_module((3, 16, 16)).state_dict())
    equal = pictures[:1].expand(20, -1, -1, -1)
    scores = attack.measure(equal, 255 - equal, torch.arange(20))
    assert all(torch.equal(values, torch.zeros(20)) for values in scores.values())


def test_variants_show_the_same(pictures: Tensor) -> None:
    images = pictures[:200].float() / 255
    torch.manual_seed(0)
    for name, variant in VARIANTS.items():
        changed = variant(images)
        assert changed.shape == images.shape, name
        assert 0 <= float(changed.min()) <= float(changed.max()) <= 1, name
        assert not torch.equal(changed, images), name
    assert torch.equal(VARIANTS["flip"](VARIANTS["flip"](images)), images)
    ramp = torch.linspace(0, 1, 16).expand(50, 3, 16, 16)
    row = VARIANTS["crop"](ramp)[:, 0, 8]
    assert ((row[:, -2] - row[:, 1]) / (13 / 15 * 7 / 8) - 1).abs().max() < 0.05  # 7 / 8 of the side, enlarged
    unchanged = (random_variants(images) == images).flatten(1).all(1).float().mean()
    assert 0.4 < float(unchanged) < 0.6
