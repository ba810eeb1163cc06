"""The guard tells protected images from plain ones, and says how well."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace

import pytest
import torch
from conftest import Trained
from torch import Tensor

from raypp.bundle import guard, model_card
from raypp.bundle.load import load_private, load_public
from raypp.data import SOURCES
from raypp.experiments import training_run
from raypp.protections import PROTECTIONS
from raypp.utils.keys import Key


@pytest.fixture(scope="module")
def pictures() -> tuple[Tensor, Tensor]:
    """Plain images to fit to, and others, uint8 (N, 3, 32, 32)."""
    importlib.import_module("sklearn.linear_model")  # takes two seconds, which would count as the first test's
    source = SOURCES.build(SOURCES.options("shapes")(name="shapes", num_train=400, num_test=100), size=None, channels=3)
    train, test = (torch.from_numpy(source.load(split).images).permute(0, 3, 1, 2) for split in ("train", "test"))
    return train, test


def calibrated(name: str, pictures: tuple[Tensor, Tensor]) -> guard.PlainImageDetector:
    options = PROTECTIONS.options(name)(name=name)
    key = Key(bytes(range(32))) if PROTECTIONS.get(name).needs_key(options) else None
    protect = PROTECTIONS.build(options, channels=3, key=key).protect
    detector = guard.calibrate_detector(pictures[0], protect(pictures[0]), pictures[1], protect(pictures[1]))
    assert detector is not None
    return detector


@pytest.mark.parametrize("name", [pytest.param("tanaka", marks=pytest.mark.slow), "ele", "pixel", "etc"])
def test_plain_images_are_refused_and_protected_ones_are_not(name: str, pictures: tuple[Tensor, Tensor]) -> None:
    detector = calibrated(name, pictures)
    assert detector.plain_refused["share"] >= 0.97
    assert detector.protected_refused["share"] <= 0.02
    assert detector.plain_refused["num"] == 100
    low, high = detector.plain_refused["interval"]
    assert low - 1e-9 <= detector.plain_refused["share"] <= high + 1e-9


def test_rates_are_honest_where_there_is_nothing_to_tell_apart(pictures: tuple[Tensor, Tensor]) -> None:
    """What protects nothing cannot be told from plain images: few are refused, and the rates say so."""
    detector = guard.calibrate_detector(pictures[0], pictures[0], pictures[1], pictures[1])
    assert detector is not None
    assert detector.plain_refused["share"] == detector.protected_refused["share"] <= 0.05


def test_a_guard_survives_json(pictures: tuple[Tensor, Tensor]) -> None:
    detector = calibrated("tanaka", pictures)
    again = guard.restore_detector(json.loads(json.dumps(detector.dump())))
    assert torch.equal(again.scores(pictures[1]), detector.scores(pictures[1]))
    damaged = detector.dump() | {"weights": [1.0]}
    with pytest.raises(ValueError, match="do not fit together"):
        guard.restore_detector(damaged)


def test_too_few_images_give_no_guard(pictures: tuple[Tensor, Tensor]) -> None:
    few = pictures[0][:199]
    assert guard.calibrate_detector(few, few, few, few) is None


def test_statistics_do_not_depend_on_the_size(pictures: tuple[Tensor, Tensor]) -> None:
    small = pictures[0][:3]
    large = small.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert guard.statistics(small).shape == guard.statistics(large).shape
    histogram = slice(0, 3 * guard.BINS)
    assert torch.allclose(guard.statistics(small)[:, histogram], guard.statistics(large)[:, histogram])


def test_a_bundle_checks_itself_by_its_sample(trained: Trained) -> None:
    private, public = load_private(trained.bundle), load_public(trained.bundle)
    assert private.problem() is None
    assert private.sample.dtype == torch.uint8
    assert public.protection.hides
    others = replace(private, sample_classes=(private.sample_classes + 1) % 10)
    assert others.problem() == "it gives the recorded answer for 0 of 30 images of its sample"
    with torch.no_grad():
        next(private.classifier.parameters()).fill_(float("nan"))
    assert private.problem() == "its answers are not finite numbers"


def test_the_card_states_the_guards_rates(trained: Trained, pictures: tuple[Tensor, Tensor]) -> None:
    detector = calibrated("tanaka", pictures)
    summary = json.loads((trained.run / "summary.json").read_text())
    environment = {"versions": {}, "hardware": "this machine"}
    card = model_card.model_card(trained.config, ("a", "b"), (16, 16), detector, summary, environment)
    assert f"| plain images that the service refuses | {detector.plain_refused['share']:.2%} (95% interval" in card
    assert "| protected images that it refuses by mistake | " in card
    assert "service refuses" not in model_card.model_card(
        trained.config, ("a", "b"), (16, 16), None, summary, environment
    )


def test_few_validation_images_give_a_bundle_without_a_guard(trained: Trained) -> None:
    assert load_private(trained.bundle).guard is None


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images(
    pictures: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = calibrated("tanaka", pictures)
    most = 7 * pictures[0][0].numel()
    monkeypatch.setattr(guard, "PART_VALUES", most)
    sizes, compute, magnify = [], guard._statistics, guard._variants
    monkeypatch.setattr(guard, "_statistics", lambda images: (sizes.append(images.numel()), compute(images))[1])
    monkeypatch.setattr(guard, "_variants", lambda images: (sizes.append(images.numel()), magnify(images))[1])
    split_detector = calibrated("tanaka", pictures)
    assert max(sizes) == most
    assert torch.allclose(split_detector.weights, whole.weights, rtol=1e-6)
    assert split_detector.threshold == pytest.approx(whole.threshold)
    assert split_detector.plain_refused == whole.plain_refused


def test_one_image_larger_than_a_part_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "PART_VALUES", 10)
    assert len(guard.statistics(torch.zeros(3, 3, 8, 8, dtype=torch.uint8))) == 3


def test_the_guard_of_large_images_is_fitted_to_a_bounded_number_of_bytes(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a bound 5,000 validation images of 224 x 224 took over 24 GB when training had ended."""
    images = torch.randint(0, 256, (400, 16, 16, 3), dtype=torch.uint8)
    lengths = []
    monkeypatch.setattr(
        training_run, "calibrate_detector", lambda *parts: lengths.append([len(part) for part in parts])
    )
    training_run._build_serving_data(trained.fit.system, images, images)
    monkeypatch.setattr(training_run, "GUARDED_BYTES", 250 * images[0].numel())
    training_run._build_serving_data(trained.fit.system, images, images)
    monkeypatch.setattr(training_run, "GUARDED_BYTES", 1)
    training_run._build_serving_data(trained.fit.system, images, images)
    assert lengths == [[400] * 4, [250] * 4, [2 * guard.LEAST] * 4]
