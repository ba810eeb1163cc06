"""The client's cost, the classifier that it could run alone, and the cloud gain."""

from __future__ import annotations

import html
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo
from conftest import Trained
from methods import victim
from torch import Tensor, nn

from raypp.attacks.array_target import ArrayTarget
from raypp.attacks.base import required
from raypp.attacks.target import Target
from raypp.bundle.model_card import leakage_card, model_card
from raypp.config.presets import load_config
from raypp.evaluation.client_cost import (
    SMALL_CLASSIFIERS,
    classifier_alone,
    cloud_epochs,
    describe_alone,
    measure_protection,
    with_gain,
)
from raypp.evaluation.report.front import accuracy_leakage_front
from raypp.evaluation.report.render import _explain_client
from raypp.evaluation.report.source import Source
from raypp.experiments import client_classifier
from raypp.experiments.attack_plan import AttackPlan, load_target_of, make_attack_plan
from raypp.experiments.attack_scores import _merge_clients
from raypp.metrics.cost import describe_cost, describe_gain, multiply_accumulates, time_per_image
from raypp.metrics.statistics import difference_interval, wilson_interval
from raypp.models import CLASSIFIERS
from raypp.protections import PROTECTIONS

TEST = {"accuracy": 0.6, "accuracy_interval": list(wilson_interval(600, 1000)), "chance": 0.1, "num_images": 1000}
COST = {"macs": 5, "milliseconds": {"median": 1.25, "q1": 1.0, "q3": 2.0, "num": 25}, "bytes": 3072}


def client(alone: float, epochs: int = 6) -> dict[str, Any]:
    """A client section where the classifier alone is right for a share of 1,000 images. The cloud trained 6 epochs."""
    plain = {"accuracy": alone, "accuracy_interval": list(wilson_interval(round(1000 * alone), 1000))}
    options = CLASSIFIERS.options("convnet")()
    return with_gain(COST, describe_alone((options, 4), TEST, plain, epochs, 6), TEST)


def test_the_papers_unet_needs_25_times_the_products_of_its_classifier() -> None:
    config = load_config("cifar10")
    with torch.device("meta"):
        unet = PROTECTIONS.build(config.protection, channels=3).eval()
        macs = multiply_accumulates(unet, torch.zeros(1, 3, 32, 32))
    assert macs == pytest.approx(1021e6, rel=1e-3)
    candidate = classifier_alone(macs, config.classifier, (3, 32, 32), 10)
    assert candidate is not None
    assert candidate[0] == config.classifier
    assert candidate[1] == pytest.approx(40.6e6, rel=2e-3)


@pytest.mark.parametrize(("budget", "name"), [(0, None), (479, None), (480, "convnet"), (3 * 10**7, "resnet20")])
def test_the_classifier_alone_fits_into_the_budget(budget: int, name: str | None) -> None:
    candidate = classifier_alone(budget, load_config("cifar10").classifier, (3, 32, 32), 10)
    assert (None if candidate is None else candidate[0].name) == name
    assert candidate is None or budget / 2 < candidate[1] <= budget


def test_small_classifiers_read_any_size() -> None:
    for small in SMALL_CLASSIFIERS:
        options = CLASSIFIERS.options(small["name"]).model_validate(small)
        assert CLASSIFIERS.build(options, num_classes=10).eval()(torch.rand(1, 3, 13, 16)).shape == (1, 10)


@pytest.mark.parametrize(
    ("shape", "num_classes", "budget"),
    [((1, 28, 28), 10, 8_485_120), ((3, 32, 32), 1000, 13_975_552), ((3, 32, 32), 1000, 192_000)],
)
def test_the_largest_affordable_classifier_is_the_candidate(
    shape: tuple[int, int, int], num_classes: int, budget: int
) -> None:
    """A smaller one stands earlier in the list."""
    candidate = classifier_alone(budget, load_config("cifar10").classifier, shape, num_classes)
    assert candidate is not None
    assert candidate[1] == budget


def test_the_products_of_a_convolution_and_of_a_linear_layer_are_counted() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4 * 4, 5))
    assert multiply_accumulates(network, torch.zeros(1, 3, 8, 8)) == 4 * 4 * 8 * 27 + 8 * 4 * 4 * 5


def test_a_keyed_protection_costs_no_products_so_its_gain_is_full() -> None:
    cost = measure_protection(victim("tanaka"), (3, 16, 16))
    assert (cost["macs"], cost["bytes"]) == (0, 768)
    section = with_gain(cost, describe_alone(None, TEST, None, None, 6), TEST)
    assert section["cloud_gain"] == pytest.approx(0.5)  # 60% against the most frequent class, 10%
    assert "No classifier fits into so few" in describe_gain(section)
    assert "no multiply-accumulates" in describe_cost(section)


@pytest.mark.parametrize(
    ("alone", "sentence"),
    [
        (0.7, "The cloud gain is negative, -10.0 points"),
        (0.61, "It does not differ from zero: the cloud adds nothing measurable"),
        (0.4, r"The cloud gain is +20.0 points (95% interval +15.7 to +24.2)."),
    ],
)
def test_the_gain_is_described_with_its_sign(alone: float, sentence: str) -> None:
    section = client(alone)
    assert sentence in describe_gain(section)
    assert "upper bound" not in describe_gain(section)
    assert section["cloud_gain"] == pytest.approx(0.6 - alone)


@pytest.mark.parametrize(
    ("alone", "sign"), [(0.7, "negative, at most -10.0"), (0.61, "at most -1.0"), (0.4, "at most +20.0")]
)
def test_a_gain_over_a_shorter_training_is_an_upper_bound(alone: float, sign: str) -> None:
    section = client(alone, epochs=3)
    assert section["cloud_gain_is_upper_bound"]
    assert f"The cloud gain is {sign} points" in describe_gain(section)
    assert "an upper bound: the client's classifier trained 3 epochs, the cloud's 6" in describe_gain(section)


def test_a_gain_over_a_much_smaller_classifier_than_the_client_affords_is_an_upper_bound() -> None:
    """The candidates end with the cloud's own classifier."""
    plain = {"accuracy": 0.4, "accuracy_interval": list(wilson_interval(400, 1000))}
    candidate = CLASSIFIERS.options("convnet")(), 40_600_000
    for macs, is_upper_bound in ((48_900_000, False), (166_200_000, True)):
        section = with_gain(COST | {"macs": macs}, describe_alone(candidate, TEST, plain, 6, 6), TEST)
        assert section["cloud_gain_is_upper_bound"] is is_upper_bound
        sentence = (
            "at most +20.0 points (95% interval +15.7 to +24.2), an upper bound: the client affords 166.2 million"
        )
        assert (sentence in describe_gain(section)) is is_upper_bound


@pytest.mark.parametrize(("suite", "epochs"), [("small", None), ("standard", None), ("quick", 0)])
def test_shipped_suites_train_plain_classifiers_as_long_as_the_bundle(suite: str, epochs: int | None) -> None:
    assert make_attack_plan(folders=("plain", "protected"), suite=suite, name="x").suite.reference_epochs == epochs


@pytest.mark.parametrize(
    ("flags", "epochs"),
    [([], 6), (["--train.mode", "frozen"], 6), (["--train.mode", "frozen", "--train.plain_epochs", "9"], 9)],
)
def test_the_clouds_epochs_are_those_of_its_longer_training(flags: list[str], epochs: int) -> None:
    assert cloud_epochs(load_config("cifar10-small", flags=flags)) == epochs


def test_newcombes_interval_of_a_difference() -> None:
    """Newcombe 1998, table II: 56/70 - 48/80 has the interval 0.0524 to 0.3339 by method 10."""
    first, second = wilson_interval(56, 70), wilson_interval(48, 80)
    assert difference_interval(56 / 70, first, 48 / 80, second) == pytest.approx((0.0524, 0.3339), abs=1e-4)


def test_time_is_measured_with_one_thread_which_is_restored() -> None:
    threads: list[int] = []
    torch.set_num_threads(2)
    try:
        times = time_per_image(lambda image: threads.append(torch.get_num_threads()) or image, torch.zeros(1))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert set(threads) == {1}
    assert times["q1"] <= times["median"] <= times["q3"]


def test_run_and_card_state_the_clients_cost(trained: Trained) -> None:
    section = json.loads((trained.run / "summary.json").read_text())["client"]
    assert section["bytes"] == 16 * 16 * 3
    assert section["macs"] == multiply_accumulates(trained.fit.system.protection, torch.zeros(1, 3, 16, 16))
    assert section["alone"]["macs"] <= section["macs"]
    assert section["cloud_gain"] is None, "the plain classifier does not fit, and a run trains no other"
    assert describe_cost(section) in (trained.bundle / "MODEL_CARD.md").read_text()


def test_a_plain_classifier_within_the_budget_serves(trained: Trained) -> None:
    from raypp.evaluation.client_cost import client_of_run

    summary = json.loads((trained.run / "summary.json").read_text())
    protection = PROTECTIONS.build(load_config("quickstart").protection, channels=3)
    args = (trained.config, protection, (3, 16, 16), summary["test"], summary["plain_test"], 10)
    section = client_of_run(*args)
    assert section["alone"]["accuracy"] == summary["plain_test"]["accuracy"]
    assert section["cloud_gain"] == pytest.approx(summary["test"]["accuracy"] - summary["plain_test"]["accuracy"])
    assert "the client's classifier trained 1 epochs, the cloud's 2" in describe_gain(section)
    card = model_card(
        trained.config, ("a", "b"), (16, 16), None, summary | {"client": section}, {"hardware": "this machine"}
    )
    assert describe_gain(section) in card


def of_bundle(trained: Trained, tmp_path: Path, *flags: str) -> tuple[AttackPlan, Target]:
    """A plan against the tiny bundle whose classifier alone must be trained, and its target."""
    flags = ("--num_queries", "10", *flags)
    attacks = ["feature_reconstruction"]
    plan = make_attack_plan(bundle=str(trained.bundle), attacks=attacks, flags=flags, storage=tmp_path, name="attack")
    return plan, load_target_of(plan)


def test_null_trains_the_clients_classifier_as_long_as_the_bundle(trained: Trained, tmp_path: Path) -> None:
    plan, target = of_bundle(trained, tmp_path)
    assert client_classifier.missing_classifiers(plan, target) == ["client_classifier"]
    config = client_classifier.client_config(plan, target)
    assert config.train.epochs == trained.config.train.epochs == 2
    assert config.train.mode == "plain"
    plan, target = of_bundle(trained, tmp_path, "--reference_epochs", "1")
    assert client_classifier.client_config(plan, target).train.epochs == 1


@pytest.mark.slow
def test_the_dry_run_estimates_the_clients_classifier(trained: Trained, tmp_path: Path) -> None:
    from raypp.experiments.estimate import estimate_attacks

    estimate = {row.name: row for row in estimate_attacks(*of_bundle(trained, tmp_path))}["client_classifier"]
    assert estimate.detail == "2 epochs of 40 images"
    assert estimate.seconds is not None
    assert estimate.seconds > 0


def test_the_dry_run_protects_a_part_of_the_attackers_images(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``itn`` protects all images before its first step, and ``unpaired_gan`` half of them: minutes with CIFAR-10."""
    from raypp.experiments import estimate

    monkeypatch.setattr(estimate, "NUM_IMAGES", 12)
    plan = make_attack_plan(
        bundle=str(trained.bundle), attacks=["itn", "inverse", "unpaired_gan"], storage=tmp_path, name="attack",
        flags=("--num_queries", "10", "--itn.width", "2", "--inverse.width", "2", "--unpaired_gan.width", "2"),
    )  # fmt: skip
    target = load_target_of(plan)
    num, protect, sizes = len(required(target.access.images)), required(target.access.protect), []

    def counted(images: Tensor) -> Tensor:
        sizes.append(len(images))
        return protect(images)

    monkeypatch.setattr(estimate, "NUM_TIMED", 1)
    target = replace(target, access=replace(target.access, protect=counted))
    rows = {row.name: row for row in estimate.estimate_attacks(plan, target)}
    assert num >= 40
    assert 12 <= sum(sizes) < num
    assert f"of {num - num // 10:,} images" in rows["itn"].detail
    assert f"of {num // 2:,} images" in rows["unpaired_gan"].detail


@pytest.mark.parametrize(
    ("setting", "is_same"),
    [("num_test 20", False), ("num_val 10", False), ("source.seed 3", False), ("shuffle_buffer 5", True)],
)
def test_a_gain_never_mixes_two_data_sets(trained: Trained, tmp_path: Path, setting: str, is_same: bool) -> None:
    name, value = setting.split()
    plan, target = of_bundle(trained, tmp_path, f"--data.{name}", value)
    assert client_classifier.missing_classifiers(plan, target) == ["client_classifier"] * is_same
    section, _ = client_classifier.measure_client_of(plan, target, {})
    assert section is not None
    assert section["cloud_gain"] is None
    reason = "the images differ from those of the bundle's training and test"
    assert (reason in describe_gain(section)) == (not is_same)


def test_the_plain_classifier_of_a_bundle_does_not_serve_for_another_size(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        client_classifier, "_largest_classifier", lambda *_: (required(trained.config).classifier, 10**6)
    )
    for size, is_measured in ((16, True), (20, False)):
        plan, target = of_bundle(trained, tmp_path, "--data.image_size", f"[{size}, {size}]")
        section, _ = client_classifier.measure_client_of(plan, target, {})
        assert section is not None
        assert section["bytes"] == size * size * 3
        assert (section["cloud_gain"] is not None) == is_measured


@pytest.mark.parametrize(
    ("is_reference", "failures", "note"),
    [
        (True, {"reference_classifier": "no memory"}, "no memory"),
        (False, {"reference_classifier": "no memory"}, ""),
        (False, {"client_classifier": "no disk"}, "no disk"),
    ],
)
def test_the_note_names_the_failed_training(
    trained: Trained,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_reference: bool,
    failures: dict[str, str],
    note: str,
) -> None:
    plan, target = of_bundle(trained, tmp_path)
    target = replace(target, metrics=dict(target.metrics or {}, plain_test=None))
    if is_reference:
        classifier = required(target.config).classifier
        monkeypatch.setattr(client_classifier, "_largest_classifier", lambda *_: (classifier, 1))
    section, _ = client_classifier.measure_client_of(plan, target, failures)
    assert section is not None
    assert section["alone"]["note"] == note


def test_a_bundle_is_counted_once(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client_classifier._largest_classifier.cache_clear()
    plan, target = of_bundle(trained, tmp_path)
    client_classifier.missing_classifiers(plan, target)
    monkeypatch.setattr(client_classifier, "load_public", None)
    assert client_classifier.client_config(plan, target).classifier.name == "convnet"


class TwoImages(nn.Module):
    """Refuses a single image, as a module with batch statistics may."""

    def forward(self, images: Tensor) -> Tensor:
        if len(images) < 2:
            raise ValueError("expected more than 1 value per channel")
        return 1 - images


class Convolution(nn.Module):
    """Counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 3, padding=1)
        self.calls: list[int] = []

    def forward(self, images: Tensor, key: float = 1.0) -> Tensor:
        self.calls.append(len(images))
        return torch.sigmoid(key * self.layer(images))


def of_arrays(protection: Any, tmp_path: Path, **more: Any) -> tuple[AttackPlan, Target]:
    images = np.random.default_rng(0).integers(0, 256, (60, 16, 16, 3), dtype=np.uint8)
    arrays = ArrayTarget(protection, images=images, **more)
    attacks = ["feature_reconstruction"]
    flags = ["--num_queries", "10"]
    plan = make_attack_plan(arrays=arrays, attacks=attacks, flags=flags, storage=tmp_path, name="attack")
    return plan, load_target_of(plan)


@pytest.mark.slow
def test_a_module_that_refuses_a_single_image_has_a_scorecard(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from raypp.cli.render import print_scorecard
    from raypp.experiments.attack_run import run_attack_suite

    card = run_attack_suite(of_arrays(TwoImages(), tmp_path)[0], quiet=True)
    assert card["attacks"]["feature_reconstruction"]["status"] == "done"
    assert card["client"] is None
    assert card["client_note"] == "ValueError: expected more than 1 value per channel"
    print_scorecard(card, "attack")
    sentence = "The client's cost was not measured: ValueError: expected more than 1 value per channel"
    assert sentence in capsys.readouterr().out
    assert _explain_client(card) == f"{sentence}."


@pytest.mark.parametrize("key_generator", [None, lambda: 2.0])
def test_a_copy_of_a_module_is_measured_on_the_cpu(tmp_path: Path, key_generator: Any) -> None:
    module = Convolution()
    plan, target = of_arrays(module, tmp_path, key_generator=key_generator)
    calls = list(module.calls)
    section, note = client_classifier.measure_client_of(plan, target, {})
    assert module.calls == calls, "the module itself lies on the target's device, which may be a GPU"
    assert section is not None
    assert (section["macs"], section["bytes"], note) == (16 * 16 * 3 * 27, 16 * 16 * 3, "")
    assert describe_gain(section) == "The cloud gain is not known; it is measured for bundles only."


def test_the_time_of_a_function_is_that_of_its_own_device(tmp_path: Path) -> None:
    section, _ = client_classifier.measure_client_of(*of_arrays(lambda images: 255 - images, tmp_path), {})
    assert section is not None
    assert section["macs"] is None
    assert "on the device and threads that it uses" in describe_cost(section)


@pytest.mark.slow
def test_an_attack_run_trains_the_classifier_that_the_client_could_run_alone(trained: Trained, tmp_path: Path) -> None:
    from raypp.api import run_attacks

    bundle = shutil.copytree(trained.bundle, tmp_path / "bundle")
    suite = tmp_path / "suite.yaml"
    suite.write_text(json.dumps({"num_queries": 10, "reference_epochs": 1, "attacks": {"feature_reconstruction": {}}}))
    plan = make_attack_plan(bundle=str(bundle), suite=str(suite), storage=tmp_path, name="attack")
    target = load_target_of(plan)
    assert client_classifier.missing_classifiers(plan, target) == ["client_classifier"]
    card = run_attacks(plan, ray=False, quiet=True)
    section = card.to_dict()["client"]
    trained_alone = json.loads((tmp_path / "attack" / "client_classifier" / "summary.json").read_text())
    assert section["alone"]["accuracy"] == trained_alone["test"]["accuracy"]
    assert section["alone"]["epochs"] < section["alone"]["cloud_epochs"]
    assert card.cloud_gain_is_upper_bound
    assert "an upper bound" in describe_gain(section)
    assert card.cloud_gain == pytest.approx(card.to_dict()["accuracy"] - trained_alone["test"]["accuracy"])
    for text in (
        (bundle / "MODEL_CARD.md").read_text(),
        leakage_card(card.to_dict()),
        (tmp_path / "attack" / "report.html").read_text(),
    ):
        assert describe_gain(section) in html.unescape(text)
    assert client_classifier.missing_classifiers(plan, target) == []


MEASURED, BOUND, NO_GAIN = client(0.5), client(0.4, epochs=3), with_gain(COST, None, TEST)


@pytest.mark.parametrize(
    ("new", "stored", "merged"),
    [
        (MEASURED, None, MEASURED),
        (MEASURED, client(0.3), MEASURED),
        (NO_GAIN, MEASURED, MEASURED),
        (BOUND, MEASURED, MEASURED),
        (MEASURED, BOUND, MEASURED),
        (NO_GAIN, BOUND, BOUND),
        (NO_GAIN, NO_GAIN, NO_GAIN),
    ],
)
def test_a_scorecard_keeps_the_more_exact_gain(
    new: dict[str, Any], stored: dict[str, Any] | None, merged: dict[str, Any]
) -> None:
    assert _merge_clients(new, stored) is merged


@pytest.mark.slow
def test_the_front_marks_the_accuracy_of_the_client_alone() -> None:
    scores = {"reidentified": {"mean": 0.5, "low": 0.4, "high": 0.6}}
    attack = {"reidentification_rate": 0.5, "verdict": "broken", "status": "done", "scores": scores}
    card: dict[str, Any] = {
        "label": "x", "target": "a", "accuracy": 0.6, "accuracy_interval": [0.5, 0.7], "strongest_attack": "inverse",
        "strongest_reconstruction": "inverse", "reidentification_rate": 0.5, "attacks": {"inverse": attack},
        "num_gallery": 1000,
    }  # fmt: skip
    clients = (client(0.9), client(0.9, epochs=3), client(0.8))
    cards = [card, *(card | {"client": section} for section in clients)]
    pngs = {accuracy_leakage_front([Source(c, {}, {})] * 2) for c in cards}
    assert len(pngs) == 4, "the mark stands at the accuracy, and the legend of an upper bound says so"
    scores["reidentified"] = {"mean": 0.5, "low": 0.3, "high": 0.7}
    assert accuracy_leakage_front([Source(card, {}, {})] * 2) not in pngs  # bars show the interval of the rate
