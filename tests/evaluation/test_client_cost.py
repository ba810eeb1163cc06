"""The client's cost, the classifier that it could run alone, and the cloud gain."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from conftest import Trained
from methods import victim
from torch import nn

from raypp.bundle.model_card import leakage_card, model_card
from raypp.config.presets import load_config
from raypp.evaluation.client_cost import (
    SMALL_CLASSIFIERS,
    classifier_alone,
    describe_alone,
    measure_protection,
    with_gain,
)
from raypp.evaluation.report.front import accuracy_leakage_front
from raypp.evaluation.report.source import Source
from raypp.experiments import client_classifier
from raypp.experiments.attack_plan import load_target_of, make_attack_plan
from raypp.experiments.attack_scores import _merge_clients
from raypp.metrics.cost import describe_cost, describe_gain, multiply_accumulates, time_per_image
from raypp.metrics.statistics import difference_interval, wilson_interval
from raypp.models import CLASSIFIERS
from raypp.protections import PROTECTIONS

TEST = {"accuracy": 0.6, "accuracy_interval": list(wilson_interval(600, 1000)), "chance": 0.1, "num_images": 1000}
COST = {"macs": 5, "milliseconds": {"median": 1.25, "q1": 1.0, "q3": 2.0, "num": 25}, "bytes": 3072}


def client(alone: float, candidate: bool = True) -> dict[str, Any]:
    """A client section where the classifier alone is right for a share of 1,000 images."""
    plain = {"accuracy": alone, "accuracy_interval": list(wilson_interval(round(1000 * alone), 1000))}
    options = CLASSIFIERS.options("convnet")()
    return with_gain(COST, describe_alone((options, 4) if candidate else None, TEST, plain, 6), TEST)


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


def test_small_classifiers_are_listed_from_the_largest_and_read_any_size() -> None:
    macs = []
    for options in SMALL_CLASSIFIERS:
        network = CLASSIFIERS.build(CLASSIFIERS.options(options["name"]).model_validate(options), num_classes=10).eval()
        assert network(torch.rand(1, 3, 13, 16)).shape == (1, 10)
        macs.append(multiply_accumulates(network, torch.rand(1, 3, 32, 32)))
    assert macs == sorted(macs, reverse=True)


def test_the_products_of_a_convolution_and_of_a_linear_layer_are_counted() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4 * 4, 5))
    assert multiply_accumulates(network, torch.zeros(1, 3, 8, 8)) == 4 * 4 * 8 * 27 + 8 * 4 * 4 * 5


def test_a_keyed_protection_costs_no_products_so_its_gain_is_full() -> None:
    cost = measure_protection(victim("tanaka"), (3, 16, 16))
    assert (cost["macs"], cost["bytes"]) == (0, 768)
    section = with_gain(cost, describe_alone(None, TEST, None, None), TEST)
    assert section["cloud_gain"] == pytest.approx(0.5)  # 60% against the most frequent class, 10%
    assert "No classifier fits into so few" in describe_gain(section)
    assert "no multiply-accumulates" in describe_cost(section)


@pytest.mark.parametrize(
    ("alone", "sentence"),
    [
        (0.7, "The cloud gain is negative, -10.0 points"),
        (0.61, "does not differ from zero: the cloud adds nothing measurable"),
        (0.4, r"The cloud gain is +20.0 points (95% interval +15.7 to +24.2)."),
    ],
)
def test_the_gain_is_described_with_its_sign(alone: float, sentence: str) -> None:
    section = client(alone)
    assert sentence in describe_gain(section)
    assert section["cloud_gain"] == pytest.approx(0.6 - alone)


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
    card = model_card(
        trained.config, ("a", "b"), (16, 16), None, summary | {"client": section}, {"hardware": "this machine"}
    )
    assert describe_gain(section) in card


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
    assert card.cloud_gain == pytest.approx(card.to_dict()["accuracy"] - trained_alone["test"]["accuracy"])
    for text in (
        (bundle / "MODEL_CARD.md").read_text(),
        leakage_card(card.to_dict()),
        (tmp_path / "attack" / "report.html").read_text(),
    ):
        assert describe_gain(section) in text
    assert client_classifier.missing_classifiers(plan, target) == []


@pytest.mark.parametrize(("new", "stored"), [(0.1, None), (None, 0.2), (0.1, 0.2), (None, None)])
def test_a_run_without_a_client_classifier_keeps_the_stored_gain(new: float | None, stored: float | None) -> None:
    merged = _merge_clients({"cloud_gain": new}, {"cloud_gain": stored})
    assert merged == {"cloud_gain": stored if new is None else new}


def test_the_front_marks_the_accuracy_of_the_client_alone() -> None:
    attack = {"reidentification_rate": 0.5, "verdict": "broken", "status": "done"}
    card: dict[str, Any] = {
        "label": "x", "target": "a", "accuracy": 0.6, "accuracy_interval": [0.5, 0.7], "strongest_attack": "inverse",
        "strongest_reconstruction": "inverse", "reidentification_rate": 0.5, "attacks": {"inverse": attack},
    }  # fmt: skip
    with_client = card | {"client": client(0.9)}
    pngs = [accuracy_leakage_front([Source(c, {}, {})] * 2) for c in (card, with_client)]
    assert pngs[0] != pngs[1]
